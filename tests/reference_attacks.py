"""Expressions that a pasted text may hold, and the process that fills each of them in.

Run as a program, this fills in the attacks one by one with little memory and time, and prints what
each did, one line of JSON for each. A process that is killed was so during the attack whose line is
missing.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import fractions
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

SECONDS = 5  # of this process, whatever else the machine does
MEMORY = 4 << 30  # bytes of address space; numpy and pandas reserve some of it

FILES = r"""
os.system("touch canary")
os.popen("touch canary").read()
os.remove("canary")
os.unlink(folder)
os.environ
os.environ["PATH"]
os.environ.get("PATH")
os.getcwd()
os.path
os.path.exists("canary")
os.sys.exit(1)
os.abort()
subprocess.getoutput("touch canary")
subprocess.run(["touch", "canary"])
subprocess.check_output("ls", shell=True)
shutil.rmtree(folder)
shutil.copy("canary", "other")
Path("canary").write_text("x")
Path("canary").unlink()
Path.cwd()
Path.home()
path.write_text("x")
path.read_text()
path.touch()
path.unlink()
path.open("w")
path.rename("other")
path.exists()
path.resolve()
path.glob("**/*")
path.iterdir()
path.parent.mkdir()
path.stat()
path.match("*a*a*a*a*a*a*b")
open("canary").read()
open("canary", "w").write("x")
print("x")
input("x")
exec("x = 1")
eval("1 + 1")
compile("1", "", "eval")
globals()
locals()
vars(obj)
dir(obj)
getattr(obj, "attr")
setattr(obj, "attr", 1)
delattr(obj, "attr")
type(obj)
type("X", (), d)
isinstance(obj, int)
breakpoint()
exit()
__import__("os").system("touch canary")
get_ipython()
get_ipython().system("touch canary")
df.to_csv("canary")
df.to_csv(path)
df.to_csv(path_or_buf="canary")
df.to_json("canary")
df.to_string("canary")
df.to_string(buf="canary")
df.to_html("canary")
df.to_markdown("canary")
df.to_pickle("canary")
df.to_parquet("canary")
df.to_sql("t", "sqlite:///canary")
df.to_excel("canary")
df.to_hdf("canary", "k")
df.to_feather("canary")
df.to_clipboard()
df.a.to_csv("canary")
df.a.to_pickle("canary")
arr.tofile("canary")
arr.dump("canary")
pd.read_csv("canary")
pd.read_pickle("canary")
np.load("canary", allow_pickle=True)
np.save("canary", arr)
np.zeros(10)
pd.DataFrame(d)
"""
CHANGES = r"""
lst.clear()
lst.append(1)
lst.pop()
lst.remove(3)
lst.sort()
lst.reverse()
lst.extend([1])
lst.insert(0, 1)
d.clear()
d.pop("k")
d.popitem()
d.update(other=1)
d.setdefault("new", 1)
d.get(obj)
dd.setdefault("new", 1)
counter.subtract(counter)
counter.update("abc")
counter.elements()
s.add(9)
s.discard(1)
s.clear()
s.update([7])
s.intersection_update([])
dq.popleft()
dq.rotate(1)
df.pop("a")
df.insert(0, "new", 1)
df.update(df)
df.drop(columns="a", inplace=True)
df.drop("a", axis=1, inplace=True)
df.fillna(0, inplace=True)
df.sort_values("a", inplace=True)
df.rename(columns=d, inplace=True)
df.reset_index(inplace=True)
df.set_index("a", inplace=True)
df.dropna(inplace=a)
df.eval("z = a + 1", inplace=True)
df.eval("@os.system('touch canary')")
df.query("@os.system('touch canary')")
df.query("a > 1")
df.apply(func)
df.apply("sum")
df.map(func)
df.pipe(func)
df.agg(func)
df.agg("to_pickle")
df.transform(func)
df.assign(z=func)
df.assign(z=text)
df.assign(z=tall)
df.assign(func, z=1)
df.where(func)
df.sample(2)
df.info()
df.plot()
df.plot
df.style
df.a.map(func)
df.a.apply(func)
df.k.str.replace("a", func)
df.groupby(func)
df.groupby("k").apply(func)
df.groupby("k").agg("apply")
df.groupby("k").pipe(func)
df.groupby("k")["a"].transform(func)
df.groupby("k").a.apply(func)
df.rolling(2).apply(func)
df.sort_values("a", key=func)
df.iterrows()
df.items()
df.attrs
df.flags
df.iat.obj
df.loc[func]
df[func]
df["a"].values.sort()
df.values.fill(0)
arr.fill(0)
arr.sort()
arr.resize(100)
arr.setflags(write=False)
arr.put(0, 9)
arr.partition(1)
arr.byteswap(inplace=True)
arr.sum(out=arr)
arr.mean(out=arr)
arr.round(0, out=arr)
arr.cumsum(out=arr)
arr.clip(0, 1, out=arr)
arr.data
arr.ctypes
arr.flat
arr.base
arr.dtype.newbyteorder()
objects.sum()
objects.max()
objects.tolist()
objects + objects
frame_of_objects.sum()
frame_of_objects["o"].max()
frame_of_objects.describe()
frame_of_objects["o"].unique()
frame_of_objects.sort_values("o")
frame_of_objects["o"] == 1
1 in frame_of_objects["o"].values
records.max()
records == records
labelled.sort_index()
labelled["a"].sort_index()
categorical == 1
categorical.max()
in_cells.sum()
abs(labelled)
labelled == 1
labelled["a"] + 1
in_cells.max()
in_cells.is_unique
in_cells.is_monotonic_decreasing
in_cells.str.len()
df.loc[evil]
arr[evil]
xs[evil:]
xs[:evil]
d[sub]
", ".join([gen])
sorted([gen])
labelled.nothing
labelled.loc[1]
[evil][0] + 1
(evil,) < (evil,)
df[evil]
df == evil
arr == evil
arr + evil
df["a"].isin([evil])
df["a"].fillna(evil)
df.get(evil)
counter[evil]
dd[evil]
od_sub["k"]
sub_dict.keys()
sorted(sub_dict)
list(sub_dict)
tuple(sub_dict)
set(sub_dict)
any(sub_dict)
all(sub_dict)
sub == "x"
"x" in sub_list
sum(sub_list)
max(sub_list)
sub_list + [1]
xs + sub_list
sum(gen)
max(gen)
min(gen)
sorted(gen)
tuple(gen)
set(gen)
any(gen)
all(gen)
len(gen)
2 in gen
", ".join(gen)
gen.send(None)
gen.close()
gen.gi_frame
gen.gi_frame.f_builtins
next(gen)
list(gen)
sum(iterator)
sorted(iterator)
list(iterator)
tuple(iterator)
set(iterator)
any(iterator)
all(iterator)
max(iterator)
sorted(zipped)
list(zipped)
tuple(zipped)
set(zipped)
any(zipped)
all(zipped)
xs.index(obj)
[gen, 1].index(2)
func()
func(1)
func.x
obj.method()
Evil()
Evil.make()
evil()
evil + 1
1 + evil
-evil
evil == 1
1 < evil
evil[0]
xs[evil]
d[evil]
d.get(evil)
evil in xs
1 in evil
not evil
len(evil)
abs(evil)
round(evil)
int(evil)
float(evil)
sorted(evil)
list(evil)
tuple(evil)
set(evil)
any(evil)
all(evil)
sum(evil)
max(evil, evil)
max([evil, evil])
sorted([evil, evil])
list([evil, evil])
tuple([evil, evil])
set([evil, evil])
any([evil, evil])
all([evil, evil])
[evil] == [evil]
[evil].index(1)
evil:.2f
evil:%Y
evil:>10
sub.upper()
sub + "x"
len(sub)
sub_list.count(1)
sub_list[0]
sub_dict["k"]
sub_dict.get("k")
sub_frame.tail()
sub_frame["a"]
sub_array.sum()
sub_array + 1
enum.name.format(obj)
random.random()
random.seed(1)
np.random.rand()
np.random.seed(1)
lazy_class.anything
lazy.anything
lazy.anything.more()
name.__class__
name.__class__.__mro__
obj.__dict__
obj._private
func.__globals__
func.__globals__["os"]
func.__code__
df._mgr
arr.__array_interface__
__builtins__
__name__
name.__len__()
obj.attr.__class__.__subclasses__()
name._＿class_＿
"{0.__class__}".format(obj)
name.format(obj)
name.format_map(d)
"%s" % obj
name % obj
"%1000000000d" % a
name.translate(d)
name.maketrans(d)
(lambda: 1)()
(a := 1)
a if b else c
a or b
len(*xs)
sorted(xs, key=func)
sorted(xs, key=len)
max(xs, key=func)
str(name, "utf-8")
pow(2, 10)
range(10)
dict(d)
map(func, xs)
filter(func, xs)
iter(xs)
hash(name)
id(name)
when.astimezone()
when.strftime(sub)
"""
SIZES = r"""
name.ljust(10000000000)
name.rjust(10000000000)
name.center(width=10000000000)
name.zfill(10000000000)
name.ljust(big_np)
name.zfill(10**10)
"\t".expandtabs(a * 10**9) + name
text.replace("", text)
text.replace("a", text)
text.join(text)
text.join(xs_of_text)
name * 10**10
10**10 * name
name * big_np
[a] * 10**10
(a,) * 10**10
xs * 10**10
name.encode() * 10**10
name * 10**6 * 10
a ** 10**10
(a + 9) ** 10000
9 ** big
big ** big
b ** b ** b ** b ** b ** big
huge * huge
huge + 1
huge
-huge
str(huge)
huge:d
int(text)
float(text)
round(a, -10**10)
round(a, 10**10)
round(fraction, 10**6)
round(big_decimal)
int(big_decimal)
big_decimal:f
big_decimal:,.2f
decimal ** 10**10
fraction ** 10**9
a << 10**10
a >> 1
arr << 10
arr @ arr
name:10000000000
name:>10000000000
price:.10000000000f
price:1001.2f
a:010000000000d
price:{a}
price:{a}.{b}f
price:{os.system("touch canary")}
when:%1000000000Y
when:%9999d
when.strftime("%1000000000d")
when.strftime(text)
sum(endless)
sorted(endless)
list(endless)
tuple(endless)
set(endless)
any(endless)
all(endless)
max(endless)
1.5 in endless
name in endless
endless.index(1.5)
endless.count(name)
s.union(endless)
s.isdisjoint(endless)
sum([xs, xs], [])
sorted(many_objects)
list(many_objects)
tuple(many_objects)
set(many_objects)
any(many_objects)
all(many_objects)
tall_index[:, None] * tall
tall[:, None] * tall
tall[:, None] + tall
tall[:, None] == tall
tall[:, None] < tall
tall[tall_index[:, None] * 0 + tall_index]
tall_index[:, None].clip(tall_index, 9)
tall * [1] * 10**9
arr.repeat(10**10)
arr.resize(10**10)
arr.astype("U1000000000")
arr.astype("object")
arr.dot(arr)
arr.astype(name)
df * df.T
tall_frame + tall_frame["a"]
tall_frame["a"] * tall_frame
dup + dup_other
dup.loc[dup_other.index]
tall_frame - tall_frame["a"]
df.k * 10**9
df.k.str.repeat(10**10)
df.k.str.pad(10**10)
df.k.str.ljust(10**10)
df.k.str.contains("(a+)+$")
df.k.str.match("(a+)+$")
df.k.str.replace("(a+)+$", "x", regex=True)
df.k.str.extract("(a+)")
df.k.str.findall("a*")
df.k.str.replace("x", text)
df.k.str.split("(a+)+$", regex=True)
tall_frame.merge(tall_frame, how="cross")
tall_frame.merge(tall_frame, on="b")
tall_frame.merge(df.assign(b=1), on="b", how="outer", copy=f)
df.merge(tall_frame, left_on="k")
df.merge(tall_frame.a)
tall_frame.pivot_table(index="a", columns="a")
tall_frame.pivot(columns="a")
df.pivot_table(index="a", aggfunc=f)
df.pivot_table(index="a", aggfunc="apply")
df.pivot_table(index=f)
tall_frame.assign(d=0).resample("1ns", on="d")
df.explode("k")
df.resample("1ns")
df.asfreq("1ns")
df.reindex(endless)
df.to_json(indent=10**9)
df.quantile(tall)
texts_frame.sum()
texts_frame["t"].sum()
sum(texts_frame["t"])
categories.groupby(["a", "b"]).size()
categories.value_counts()
laughs
laughs!r
str(laughs)
repr(laughs)
laughs == laughs
sorted([laughs, laughs])
max(laughs, laughs)
tall[:, None][:, tall * 0]
tall[None, None][tall[None][:, 0] > -1, tall * 0]
tall[None][True, tall * 0]
documents[tall * 0]
documents[:, None] + documents
documents[:, None] == documents
long_texts.sum()
long_texts.t.cumsum()
long_texts.groupby("t").sum()
df.describe(percentiles=shares)
many_columns[["x"] * 10000]
many_columns + many_labels
by_town.loc[["Paris"] * 10000]
many
many!r
str(many)
sorted(many)
dup.index.repeat(10**9)
"""
ENVIRONMENT = r"""
str(os.environ)
repr(os.environ)
"x".join([str(os.environ)])
str([os.environ])
[os.environ] + []
[os.environ] * 1
[os.environ][0]
[os.environ, 1][:1]
max([str(os.environ)])
os.environ!r
os.environ:>5
os.environ["HOME"]
os.environ.copy
os.environ.copy!r
os.environ.get
os.environ.items
os.environ.values
os.environ.setdefault
os.environ.encodekey
os.environb
os.environb.copy
os.__dict__
sys.modules
sys.modules["os"]
sys.modules["os"].environ
sys.modules["os"].sep
sys.modules["posix"].environ
sys.modules["posix"].environ.items()
sys.modules.get("posix").environ
sys.modules["__main__"].values
sys.argv
sys.path
modules["os"].environ
modules["os"].sep
modules.get("sys").version
listed_modules[0].sep
holder.module.sep
holder.module.environ
holder.environment
holder.environment.copy
in_dict
in_dict!r
in_dict["e"]
in_dict.values()
in_dict.get("e")
str(in_dict)
in_list
in_list[0]
in_series
in_series.to_string()
in_chain
in_space
in_partial
in_array
in_dict_of_object
environment_items
environment_copy
environment_copy!r
str(environment_copy)
[environment_copy] * 1
lst_append
lst_append!r
[lst_append] * 1
"""
HASHES = r"""
same_hash["a"]
same_hash.get("a")
same_hash_counter["a"]
same_hash_default["a"]
zoned:%Z
zoned.utcoffset()
zoned.timestamp()
zoned.isoformat()
zoned.strftime("%Z")
zoned == when
zoned < zoned
zoned - zoned
max(zoned, zoned)
[zoned] == [zoned]
sorted([zoned, zoned])
[zoned].index(when)
d.get(zoned)
zoned_time:%Z
zoned_time.tzname()
zoned_time == zoned_time
zoned_stamp.utcoffset()
in_levels.groupby(["p", "q", "r"], observed=False).size()
in_levels["v"].groupby(level=[0, 1, 2], observed=False).sum()
in_levels["v"].groupby(["p", "q", "r"], observed=False).sum()
in_levels.groupby(["p", "p", "p"], observed=False).size()
in_levels.groupby(level=[0, 0, 0], observed=False).size()
wide.groupby([wide.a, wide.b], observed=False).size()
wide.groupby(["a", "n"], observed=False).size()
wide.value_counts(subset=["a", "b"])
sub_day.replace(year=2000)
sub_day + sub_day_delta
sub_deque.copy()
sub_deque * 2
sub_counter.copy()
sub_ordered.copy()
sub_ordered | sub_ordered
records[0] == records[0]
in_arrays == 1
in_arrays.max()
list(in_arrays)
set(in_arrays)
any(in_arrays)
", ".join(in_arrays)
list(category_array)
", ".join(category_array)
category_array == 1
category_array == "a"
"""
ATTACKS = [
    line
    for text in (FILES, CHANGES, SIZES, ENVIRONMENT, HASHES)
    for line in text.splitlines()
    if line
]

TOUCHED: list[str] = []


def touch(name: str, result: Any = None) -> Any:
    TOUCHED.append(name)
    return result


def func(*args: Any, **named: Any) -> Any:
    return touch("func", True)


class Evil:
    """Every operation on it leaves a trace."""

    def __init__(self) -> None:
        self.attr = 1

    @staticmethod
    def make() -> None:
        touch("make")

    def method(self) -> None:
        touch("method")


def _special(name: str) -> Any:
    def run(self: Any, *args: Any) -> Any:
        return touch(name, {"__len__": 1, "__int__": 1, "__hash__": 1}.get(name, True))

    return run


SPECIAL = tuple(
    """__call__ __add__ __radd__ __neg__ __eq__ __lt__ __gt__ __getitem__ __contains__ __len__
__bool__ __abs__ __round__ __int__ __float__ __index__ __iter__ __format__ __hash__ __mul__""".split()  # noqa: SIM905 - one a line would be 20
)
for special in SPECIAL:
    setattr(Evil, special, _special(special))


class Text(str):
    def upper(self) -> str:
        return str(touch("upper", "x"))

    def __add__(self, other: str) -> str:
        return str(touch("__add__", "x"))

    def __len__(self) -> int:
        return int(touch("__len__", 1))


class List(list[Any]):
    def count(self, value: Any) -> int:
        return int(touch("count", 1))

    def __getitem__(self, key: Any) -> Any:
        return touch("__getitem__")


class Dict(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        return touch("__missing__")

    def __getitem__(self, key: str) -> Any:
        return touch("__getitem__")

    def get(self, key: str, default: Any = None) -> Any:
        return touch("get")


# Made so because the stubs of pandas call these methods final.
Frame: Any = type(
    "Frame",
    (pd.DataFrame,),
    {"tail": lambda *_: touch("tail"), "__getitem__": lambda *_: touch("__getitem__")},
)


class Array(np.ndarray):
    def __array_ufunc__(self, *args: Any, **named: Any) -> Any:
        return touch("__array_ufunc__")

    def sum(self, *args: Any, **named: Any) -> Any:
        return touch("sum")


@dataclasses.dataclass
class Plain:
    attr: Any = 1
    _private: int = 2

    def method(self) -> None:
        touch("method")


class Ordered:
    def __lt__(self, other: object) -> bool:
        return bool(touch("__lt__", True))

    def __gt__(self, other: object) -> bool:
        return bool(touch("__gt__", True))

    def __add__(self, other: object) -> Any:
        return touch("__add__", self)

    def __hash__(self) -> int:
        return int(touch("__hash__", 1))

    def __eq__(self, other: object) -> bool:
        return bool(touch("__eq__", True))


class SameHash:
    """A key whose hash is that of a text."""

    def __hash__(self) -> int:
        return hash("a")

    def __eq__(self, other: object) -> bool:
        return bool(touch("__eq__", True))


class Zone(datetime.tzinfo):
    """A time zone of the user's."""

    def utcoffset(self, when: datetime.datetime | None) -> datetime.timedelta:
        return touch("utcoffset", datetime.timedelta(0))  # type: ignore[no-any-return]

    def dst(self, when: datetime.datetime | None) -> datetime.timedelta:
        return touch("dst", datetime.timedelta(0))  # type: ignore[no-any-return]

    def tzname(self, when: datetime.datetime | None) -> str:
        return str(touch("tzname", "zone"))


def counting_instances(base: Any, *args: Any) -> Any:
    """Return an object of a class that runs code for each object that is made of it."""

    def new(cls: Any, *given: Any, **named: Any) -> Any:
        touch("__new__")
        return base.__new__(cls, *given, **named)

    return type("Counting", (base,), {"__new__": new})(*args)


class LazyModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return touch("lazy")


def in_levels() -> pd.DataFrame:
    """Return a table of three rows with 550 categories in each level of its labels."""
    level = pd.Categorical([0, 1, 2], categories=range(550))
    index = pd.MultiIndex.from_arrays([level] * 3, names=["p", "q", "r"])
    return pd.DataFrame({"v": [1, 2, 3]}, index=index)


def holders() -> dict[str, Any]:
    """Return what has the environment, modules and bound methods in it."""
    return {
        "sys": sys, "modules": {"os": os, "sys": sys}, "listed_modules": [os],
        "holder": Plain(), "in_dict": {"e": os.environ}, "in_list": [os.environ],
        "in_array": pd.Series([os.environ, 1]).to_numpy(),
        "in_dict_of_object": types.SimpleNamespace(d={"list": [os.environ]}),
        "in_series": pd.Series([os.environ, 1]),
        "in_chain": collections.ChainMap({}, os.environ),
        "in_space": types.SimpleNamespace(e=os.environ),
        "in_partial": functools.partial(os.environ.get, "x"),
        "environment_items": os.environ.items(), "environment_copy": os.environ.copy,
        "lst_append": [1].append,
        "lazy_class": LazyModule("lazy"),
        "documents": np.array(["word " * 2000] * 2000),
        "long_texts": pd.DataFrame({"t": ["word " * 20_000] * 900}),
        "shares": [n / 1000 for n in range(1000)],
        "sub_day": counting_instances(datetime.datetime, 2026, 1, 2),
        "sub_day_delta": datetime.timedelta(1),
        "sub_deque": counting_instances(collections.deque, [1]),
        "sub_counter": counting_instances(collections.Counter, "ab"),
        "sub_ordered": counting_instances(collections.OrderedDict, [("a", 1)]),
        "in_arrays": pd.Series([np.array([Ordered()]), 1]),
        "category_array": pd.Categorical.from_codes([0], pd.Index([SameHash()], dtype=object)),
        "many_columns": pd.DataFrame(np.zeros((100, 10_000)), columns=["x"] * 10_000),
        "many_labels": pd.Series(1, index=["x"] * 9_999),
        "by_town": pd.Series(
            1, index=pd.MultiIndex.from_product([["Paris"], range(100_000)]), name="size"
        ),
        "same_hash": {SameHash(): 1}, "same_hash_counter": collections.Counter([SameHash()]),
        "same_hash_default": collections.defaultdict(int, {SameHash(): 1}),
        "zoned": datetime.datetime(2026, 1, 2, tzinfo=Zone()),
        "zoned_time": datetime.time(9, tzinfo=Zone()),
        "zoned_stamp": pd.Timestamp(2026, 1, 2, tzinfo=Zone()),
        "in_levels": in_levels(),
        "wide": pd.DataFrame({
            "a": pd.Categorical(range(20_000)), "b": pd.Categorical(range(20_000)),
            "n": range(20_000),
        }),
    }  # fmt: skip


def lazy_module() -> types.ModuleType:
    module = types.ModuleType("lazy")
    module.__getattr__ = lambda name: touch("lazy")  # type: ignore[method-assign]
    return module


def generator() -> Iterator[int]:
    for number in range(3):
        touch("generator")
        yield number


def nested() -> list[Any]:
    value: list[Any] = ["x"]
    for _ in range(60):
        value = [value, value]
    return value


def values() -> dict[str, Any]:
    """Return the notebook that is attacked; its values do not change."""
    evil = Evil()
    tall = np.arange(1_000_000)
    big = pd.Categorical(["x", "y"], categories=["x", "y", *map(str, range(40_000))])
    names: dict[str, Any] = {
        "os": os, "subprocess": subprocess, "shutil": shutil, "Path": pathlib.Path, "np": np,
        "pd": pd, "random": random, "lazy": lazy_module(),
        "path": pathlib.Path("canary"), "folder": "folder", "name": "Ada", "text": "a" * 100_000,
        "a": 1, "b": 2, "c": 3, "price": 3.5, "big": 10**6, "huge": 1 << 200_000, "big_np": np.int64(10**10),
        "xs": [1, 2, 3], "lst": [3, 1, 2], "d": {"k": "v"}, "s": {1, 2}, "xs_of_text": ["a"] * 1000,
        "dd": collections.defaultdict(lambda: touch("default")), "counter": collections.Counter("ab"),
        "dq": collections.deque([1, 2]), "when": datetime.datetime(2026, 1, 2),
        "decimal": decimal.Decimal(3), "big_decimal": decimal.Decimal("1e999999999"),
        "fraction": fractions.Fraction(1, 3), "endless": range(10**15), "laughs": nested(),
        "many": list(range(1_100_000)), "many_objects": [Ordered(), Ordered()],
        "df": pd.DataFrame({"a": [1, 2, 3], "k": ["x", "y", "a" * 40 + "!"]}),
        "tall_frame": pd.DataFrame({"a": np.arange(100_000), "b": 1}),
        "texts_frame": pd.DataFrame({"t": ["some text " * 10] * 50_000}),
        "dup": pd.Series(1, index=["x"] * 50_000), "dup_other": pd.Series(1, index=["x"] * 50_001),
        "categories": pd.DataFrame({"a": big, "b": big}),
        "frame_of_objects": pd.DataFrame({"o": [Ordered(), Ordered()]}),
        "arr": np.arange(6), "tall": tall, "tall_index": tall, "objects": np.array([Ordered()] * 2),
        "records": np.array([(Ordered(),)] * 2, dtype=[("f", "O")]),
        "labelled": pd.DataFrame({"a": [1, 2]}, index=pd.Index([Ordered(), Ordered()], dtype=object)),
        "categorical": pd.Series(pd.Categorical.from_codes([0, 0], pd.Index([Ordered()], dtype=object))),
        "in_cells": pd.Series([[Ordered()], [Ordered()]]),
        "od_sub": type("Sub", (collections.OrderedDict,), {"__missing__": lambda *_: touch("missing")})(),
        "obj": Plain(), "func": func, "Evil": Evil, "evil": evil, "sub": Text("x"),
        "sub_list": List([1]), "sub_dict": Dict(k=1), "sub_frame": Frame({"a": [1]}),
        "sub_array": np.arange(3).view(Array), "gen": generator(), "iterator": iter([1, 2, 3]),
        "zipped": zip([1], [2], strict=True), "enum": types.SimpleNamespace(name="{0.attr}"),
        "__name__": "__main__", "__builtins__": __builtins__, **holders(),
    }  # fmt: skip
    names["holder"].module, names["holder"].environment = os, os.environ
    return names


STATE = ("lst", "d", "s", "dd", "counter", "dq", "xs", "df", "arr")


def state(names: dict[str, Any]) -> str:
    """Return all that an attack might change."""
    shown = [repr(names[name]) for name in STATE]
    files = sorted(os.listdir("."))  # noqa: PTH208
    left = names["iterator"].__length_hint__()
    random_state = hash(str(np.random.get_state())) ^ hash(random.getstate())
    return repr((shown, files, pathlib.Path("canary").read_text(), left, random_state, TOUCHED))


def main() -> None:
    from llm_magic.errors import PromptError
    from llm_magic.prompts.template import fill

    names = values()
    fill("{df.describe()} {df.k.str.len()}", names)  # imports what pandas imports late
    before = state(names)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for attack in ATTACKS[int(sys.argv[1]) :]:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # kills the process
        try:
            filled = fill(f"see {{{attack}}} there", names)
            result: Any = [filled.text, filled.notes]
        except PromptError as error:
            result = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        changed = state(names)
        print(json.dumps([attack, result, changed == before]), flush=True)  # noqa: T201
        before = changed


if __name__ == "__main__":
    main()
