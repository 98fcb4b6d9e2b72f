// Controls that ipywidgets has not: a named slider with its number, a text box that Ctrl+Enter sends,
// a text that can be copied. Plain elements, so that keyboards and screen readers know them.

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function follow(model, names, draw) {
  const all = names.map((name) => `change:${name}`).join(" ");
  model.on(all, draw);
  draw();
  return () => model.off(all, draw);
}

function number({ model, el }) {
  const label = model.get("label");
  const range = { min: model.get("minimum"), step: model.get("step") };
  const slider = element("input", {
    type: "range", ...range, max: model.get("maximum"), ariaLabel: `${label}, slider`,
  });
  const field = element("input", { type: "number", ...range, ariaLabel: label });
  if (model.get("bounded")) field.max = model.get("maximum");
  const none = element("input", { type: "checkbox", ariaLabel: `${label}: ${model.get("none_label")}` });
  const name = element("span", { className: "llm-name" }, label);
  const mark = element("span", { className: "llm-mark", role: "img", title: "changed in this session" });
  const left = element("label", { className: "llm-none" }, none, model.get("none_label"));
  el.classList.add("llm-number");
  el.title = model.get("help");
  el.append(element("div", { className: "llm-top" }, name, mark, left));
  el.append(element("div", { className: "llm-pair" }, ...(model.get("slides") ? [slider, field] : [field])));

  function set(value) {
    model.set("value", value);
    model.save_changes();
  }
  // What was typed goes to Python as it is: the option table says what is right, once, for everybody.
  const commit = (source) => { if (source.value === "") draw(); else set(Number(source.value)); };
  slider.addEventListener("input", () => { field.value = slider.value; });
  slider.addEventListener("change", () => commit(slider));
  field.addEventListener("change", () => commit(field));
  field.addEventListener("keydown", (event) => { if (event.key === "Enter") commit(field); });
  none.addEventListener("change", () => set(none.checked ? null : model.get("fallback")));

  return follow(model, ["value", "changed"], draw);

  function draw() {
    const value = model.get("value");
    none.checked = value === null;
    slider.disabled = field.disabled = value === null;
    if (value !== null) {
      slider.value = value;
      field.value = value;
    }
    mark.textContent = model.get("changed") ? "●" : "";
    mark.ariaLabel = model.get("changed") ? "changed" : "";
    el.classList.toggle("llm-changed", model.get("changed"));
  }
}

function prompt({ model, el }) {
  const box = element("textarea", {
    rows: 4, placeholder: model.get("placeholder"), ariaLabel: model.get("label"),
  });
  el.classList.add("llm-prompt");
  el.append(box);
  box.addEventListener("input", () => {
    model.set("value", box.value);
    model.save_changes();
  });
  // Before JupyterLab sees it, for whom Ctrl+Enter runs the cell.
  box.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      model.send({ do: "send", text: box.value });
    }
  });
  return follow(model, ["value"], () => {
    if (box.value !== model.get("value")) box.value = model.get("value");
  });
}

// Where the browser forbids it (no https), the text is selected instead, for Ctrl+C.
async function copy(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
    return "Copied";
  } catch {
    const selection = window.getSelection();
    if (shown) selection.selectAllChildren(shown);
    return "Press Ctrl+C";
  }
}

// JupyterLab has no way for a widget to ask for a cell: the toolbar's own button makes one, and the text is
// pasted into it, as a person would.
async function intoNextCell(el, text) {
  const panel = el.closest(".jp-NotebookPanel");
  const plus = panel?.querySelector('[data-command="notebook:insert-cell-below"]');
  if (!plus) return false;
  const before = new Set(panel.querySelectorAll(".jp-Cell"));
  plus.dispatchEvent(new MouseEvent("mousedown", { button: 0, bubbles: true, cancelable: true }));
  for (let tries = 0; tries < 40; tries += 1) {
    await new Promise((done) => setTimeout(done, 25));
    const cell = [...panel.querySelectorAll(".jp-Cell")].find((one) => !before.has(one));
    const editor = cell?.querySelector(".cm-content");
    if (editor) {
      const data = new DataTransfer();
      data.setData("text/plain", text);
      editor.focus();
      editor.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
      return true;
    }
  }
  return false;
}

function text({ model, el }) {
  const shown = element("code", { className: "llm-line" });
  const said = element("span", { className: "llm-said", role: "status" });
  const copies = element("button", { className: "jupyter-button", textContent: model.get("label") });
  const puts = element("button", { className: "jupyter-button", textContent: "Put into next cell" });
  el.classList.add("llm-text");
  el.append(...(model.get("shown") ? [shown] : []), copies, puts, said);
  const say = (words) => {
    said.textContent = words;
    setTimeout(() => { said.textContent = ""; }, 3000);
  };
  copies.addEventListener("click", async () => say(await copy(model.get("value"), shown)));
  puts.addEventListener("click", async () => {
    const code = model.get("code");
    if (await intoNextCell(el, code)) say("It is in the next cell");
    else say(`${await copy(code, shown)}: paste it into a cell`);
  });
  return follow(model, ["value", "code"], () => {
    shown.textContent = model.get("value");
    copies.hidden = model.get("value") === "";
    puts.hidden = model.get("code") === "";
  });
}

const kinds = { number, prompt, text };

// JupyterLab's command mode takes the keys of all but text fields: arrows for sliders and lists would move
// between cells, and x would cut this one. It leaves alone what says so on the focused element itself.
const keepsKeys = new WeakSet();
function keepKeys(place) {
  if (!place || keepsKeys.has(place)) return;
  keepsKeys.add(place);
  place.addEventListener("focusin", (event) => { event.target.dataset.lmSuppressShortcuts = "true"; });
}

export default {
  render(context) {
    const { el, model } = context;
    keepKeys(el);
    // The stock controls around it, too, once it stands among them.
    const attached = new ResizeObserver(() => keepKeys(el.closest(".llm-panel")));
    attached.observe(el);
    const undo = kinds[model.get("kind")](context);
    return () => {
      attached.disconnect();
      undo();
    };
  },
};
