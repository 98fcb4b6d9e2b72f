// Widgets that ipywidgets does not have: a slider with a number field, a text box that Ctrl+Enter sends,
// a text to copy. Standard elements, so that keyboards and screen readers support them.

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
  // Python receives the typed value unchanged and validates it.
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
  // Stops JupyterLab, in which Ctrl+Enter runs the cell.
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

// Without https the browser forbids copying: then the text is selected, for Ctrl+C.
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

// JupyterLab has no API for widgets to create a cell: this clicks the toolbar's button and pastes the text.
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
  const status = element("span", { className: "llm-status-text", role: "status" });
  const copies = element("button", { className: "jupyter-button", textContent: model.get("label") });
  const puts = element("button", { className: "jupyter-button", textContent: "Put into next cell" });
  el.classList.add("llm-text");
  el.append(...(model.get("shown") ? [shown] : []), copies, puts, status);
  const announce = (message) => {
    status.textContent = message;
    setTimeout(() => { status.textContent = ""; }, 3000);
  };
  copies.addEventListener("click", async () => announce(await copy(model.get("value"), shown)));
  puts.addEventListener("click", async () => {
    const code = model.get("code");
    if (await intoNextCell(el, code)) announce("Put into the next cell");
    else announce(`${await copy(code, shown)}: paste it into a cell`);
  });
  return follow(model, ["value", "code"], () => {
    shown.textContent = model.get("value");
    copies.hidden = model.get("value") === "";
    puts.hidden = model.get("code") === "";
  });
}

const kinds = { number, prompt, text };

// JupyterLab's command mode handles the keys of all elements but text fields: arrow keys would select another
// cell, and x would cut this one. The attribute `lmSuppressShortcuts` of the focused element prevents that.
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
    // Also for the other widgets of the panel, once this one is attached to it.
    const attached = new ResizeObserver(() => keepKeys(el.closest(".llm-panel")));
    attached.observe(el);
    const undo = kinds[model.get("kind")](context);
    return () => {
      attached.disconnect();
      undo();
    };
  },
};
