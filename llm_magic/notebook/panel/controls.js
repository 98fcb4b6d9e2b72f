// Widgets that ipywidgets does not have: a slider with a number field, a text box that Ctrl+Enter sends,
// a text to copy, a notice while the kernel is busy, a conversation that follows the newest answer.
// Standard elements, so that keyboards and screen readers support them.

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

// A kernel handles messages in their order, and often only between two cells.
const SOON_MS = 200;
const QUEUED = "Queued: the kernel is running a cell.";
const LOST = "The kernel was restarted or shut down. Run %load_ext llm_magic and %llm_panel again.";

// Ask the kernel for a sign of life and resolve when it comes. `late` is called with a text if that takes long.
// Kernels differ in what they handle while a cell runs, so this asks instead of reading their state.
// A ping that `waits` is answered between two cells only, as is a prompt that uses their variables.
function heard(model, late, waits = false) {
  const id = `${Date.now()}-${Math.random()}`;
  return new Promise((resolve) => {
    const timer = setTimeout(() => late(QUEUED), SOON_MS);
    const listen = (message) => {
      if (message.heard !== id) return;
      clearTimeout(timer);
      model.off("msg:custom", listen);
      resolve();
    };
    model.on("msg:custom", listen);
    model.send({ do: "ping", id, waits });
  });
}

// The state of the model in the status line is that before the click.
function showQueued(el, notice, text) {
  notice.textContent = text;
  el.closest(".llm-panel")?.classList.toggle("llm-waits", text !== "");
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
  const mark = element("span", {
    className: "llm-mark", role: "img", ariaLabel: "changed", title: "changed in this session",
  }, "●");
  const left = element("label", { className: "llm-none" }, none, model.get("none_label"));
  const complaint = element("div", { className: "llm-wrong", role: "alert" });
  el.classList.add("llm-number");
  el.title = model.get("help");
  el.append(element("div", { className: "llm-top" }, name, mark, left));
  el.append(element("div", { className: "llm-pair" }, ...(model.get("slides") ? [slider, field] : [field])));
  const note = element("div", { className: "llm-quiet", role: "status" });
  el.append(complaint, note);

  function set(value) {
    model.set("value", value);
    model.save_changes();
    draw();
  }
  // All digits are visible, beside the arrows of the field.
  const widen = () => { field.style.width = `calc(${field.value.length}ch + 34px)`; };
  // Python receives the typed number unchanged and validates it. A text is no number in any browser.
  const commit = (source) => {
    if (source.value !== "") set(Number(source.value));
    else if (source.validity.badInput) {
      model.set("error", `${label} must be a number${model.get("range") ? `, ${model.get("range")}` : ""}.`);
      model.save_changes();
    } else set(model.get("used"));
  };
  slider.addEventListener("input", () => { field.value = slider.value; widen(); });
  field.addEventListener("input", widen);
  slider.addEventListener("change", () => commit(slider));
  field.addEventListener("change", () => commit(field));
  field.addEventListener("keydown", (event) => { if (event.key === "Enter") commit(field); });
  none.addEventListener("change", () => set(none.checked ? null : model.get("fallback")));

  return follow(model, ["value", "changed", "error", "note"], draw);

  function draw() {
    const [value, error] = [model.get("value"), model.get("error")];
    complaint.textContent = error;
    field.ariaInvalid = error === "" ? null : "true";
    note.textContent = model.get("note");
    none.checked = value === null;
    slider.disabled = field.disabled = value === null;
    // A text that is no number stays with its error.
    if (value !== null && !(field.validity.badInput && error !== "")) {
      slider.value = value;
      field.value = value;
    }
    widen();
    mark.hidden = !model.get("changed");
    el.classList.toggle("llm-changed", model.get("changed"));
  }
}

function together(...texts) {
  return texts.filter((text) => text !== "").join("\n\n");
}

function prompt({ model, el }) {
  const box = element("textarea", {
    rows: 4, placeholder: model.get("placeholder"), ariaLabel: model.get("label"),
  });
  const send = element("button", { className: "jupyter-button mod-primary", textContent: "Send" });
  const hint = element("span", { className: "llm-quiet" }, model.get("hint"));
  const queued = element("span", { className: "llm-queued", role: "status" });
  const withdraw = element("button", { className: "jupyter-button", textContent: "Withdraw" });
  el.classList.add("llm-prompt");
  const waiting = element("div", { className: "llm-turn llm-pending" });
  el.append(box, element("div", { className: "llm-send" }, hint, queued, withdraw, send), waiting);
  // The text that was sent and not accepted yet.
  let pending = null;
  // The text that was accepted last, until the kernel restores it.
  let accepted = null;
  let sendsNext = false;

  const keep = () => {
    model.set("value", box.value);
    model.save_changes();
  };
  function settle(sent, isAccepted) {
    if (pending !== sent) return;
    pending = null;
    const hadFocus = document.activeElement === withdraw;
    // Below it is what was typed in the meantime.
    if (isAccepted) accepted = sent;
    else box.value = together(sent.text, box.value);
    keep();
    draw();
    if (hadFocus) box.focus();
    const next = isAccepted && sendsNext;
    sendsNext = false;
    if (next) submit();
  }
  // The prompt got no answer; below it is what was typed in the meantime.
  function restore() {
    box.value = together(accepted.text, box.value);
    accepted = null;
    if (!pending) keep();
  }
  // No message reaches a new kernel: what was not accepted stays in the box, to be copied.
  function lose() {
    const panel = el.closest(".llm-panel");
    if (box.readOnly || !panel) return;
    if (pending) box.value = together(pending.text, box.value);
    box.readOnly = true;
    panel.classList.add("llm-lost");
    panel.prepend(element("div", { className: "llm-error", role: "alert" }, LOST));
  }
  async function submit() {
    if (box.readOnly) return;
    if (pending) {
      sendsNext = true;
      return;
    }
    const sent = { id: `${Date.now()}-${Math.random()}`, text: box.value };
    pending = sent;
    // The model keeps the text until it is accepted: this page may be closed before.
    box.value = "";
    el.dispatchEvent(new CustomEvent("llm-asked", { bubbles: true }));
    await heard(model, (text) => { if (pending === sent) draw(text); }, sent.text.includes("{"));
    // Withdrawn texts do not reach the kernel.
    if (pending !== sent) return;
    draw();
    model.send({ do: "send", id: sent.id, text: sent.text });
  }
  const answered = (message) => {
    if (message.failed && message.sent === accepted?.id) restore();
    else if (pending && message.sent === pending.id) settle(pending, message.accepted);
  };
  model.on("msg:custom", answered);
  // A restart, a crash; a shutdown, another kernel.
  model.on("comm_live_update", lose);
  const kernel = model.widget_manager?.kernel;
  kernel?.disposed.connect(lose);
  box.addEventListener("input", keep);
  send.addEventListener("click", submit);
  withdraw.addEventListener("click", () => settle(pending, false));
  // Stops JupyterLab, in which Ctrl+Enter runs the cell.
  box.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      submit();
    }
  });
  function draw(text = "") {
    showQueued(el, queued, text);
    hint.hidden = text !== "";
    withdraw.hidden = waiting.hidden = text === "";
    waiting.textContent = text === "" ? "" : pending.text;
    send.disabled = model.get("disabled") || pending !== null;
  }
  const undo = follow(model, ["disabled"], () => { if (!pending) draw(); });
  const undoValue = follow(model, ["value"], () => {
    if (!pending && box.value !== model.get("value")) box.value = model.get("value");
  });
  return () => {
    undo();
    undoValue();
    model.off("msg:custom", answered);
    model.off("comm_live_update", lose);
    kernel?.disposed.disconnect(lose);
  };
}

// Shows, after a click in its section, that the kernel has not handled it yet.
function queue({ model, el }) {
  const notice = element("span", { className: "llm-queued", role: "status" });
  el.classList.add("llm-queue");
  el.append(notice);
  let latest = 0;
  async function check(event) {
    const control = event.target.closest("button, input, select, textarea");
    // These widgets do their work in the page, or show by themselves that they wait.
    if (!control || control.closest(".llm-prompt, .llm-text, .llm-scroll")) return;
    if (event.type === "click" && !control.matches("button")) return;
    const mine = latest += 1;
    await heard(model, (text) => { if (mine === latest) showQueued(el, notice, text); });
    if (mine === latest) showQueued(el, notice, "");
  }
  return whenAttached(el, ".llm-section", (section) => {
    section.addEventListener("click", check);
    section.addEventListener("change", check);
    return () => {
      section.removeEventListener("click", check);
      section.removeEventListener("change", check);
    };
  });
}

// What a reader does in a page; after it, the page stays where it is.
const ACTIONS = ["wheel", "touchmove", "pointerdown", "keydown"];

// Makes the box around it follow the newest answer, until the reader scrolls up; and its answers can be copied.
// After a prompt is sent, the page scrolls to the box, until the reader does anything else.
function conversation({ model, el }) {
  return whenAttached(el, ".llm-scroll", (box) => {
    Object.assign(box, { role: "log", ariaLabel: "Conversation", tabIndex: 0 });
    let follows = true;
    let isShown = false;
    let seen = { top: 0, height: 0 };
    const look = () => { seen = { top: box.scrollTop, height: box.scrollHeight }; };
    const arrive = () => {
      addCopyButtons(box);
      if (follows) box.scrollTop = box.scrollHeight;
      if (isShown) box.scrollIntoView({ block: "nearest" });
      look();
    };
    const scrolled = () => {
      const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 4;
      // A text that becomes shorter moves the view up, too.
      if (isAtEnd) follows = true;
      else if (box.scrollTop < seen.top && box.scrollHeight === seen.height) follows = false;
      look();
    };
    const wheeled = (event) => { if (event.deltaY < 0 && box.scrollTop > 0) follows = false; };
    const asked = () => { follows = isShown = true; arrive(); };
    const acted = () => { isShown = false; };
    const panel = box.closest(".llm-panel");
    box.addEventListener("scroll", scrolled);
    box.addEventListener("wheel", wheeled, { passive: true });
    panel?.addEventListener("llm-asked", asked);
    ACTIONS.forEach((name) => document.addEventListener(name, acted, { capture: true, passive: true }));
    const changes = new MutationObserver(arrive);
    changes.observe(box, { childList: true, subtree: true, characterData: true });
    const sizes = new ResizeObserver(arrive);
    [box, ...box.children].forEach((one) => sizes.observe(one));
    // A screen reader announces an answer once, at its end.
    const undo = follow(model, ["busy"], () => { box.ariaBusy = String(model.get("busy")); });
    arrive();
    return () => {
      undo();
      changes.disconnect();
      sizes.disconnect();
      box.removeEventListener("scroll", scrolled);
      box.removeEventListener("wheel", wheeled);
      panel?.removeEventListener("llm-asked", asked);
      ACTIONS.forEach((name) => document.removeEventListener(name, acted, { capture: true }));
    };
  });
}

function addCopyButtons(box) {
  [...box.querySelectorAll(".llm-answer")].forEach((answer, index) => {
    const text = answer.dataset.source;
    if (text === undefined || answer.querySelector(".llm-copy")) return;
    const status = element("span", { className: "llm-status-text", role: "status" });
    const button = element("button", {
      className: "jupyter-button", textContent: "Copy", ariaLabel: `Copy answer ${index + 1}`,
    });
    button.addEventListener("click", async () => announce(status, await copy(text, button)));
    answer.append(element("div", { className: "llm-copy" }, button, status));
  });
}

// Without https, and where the page is not allowed to, the newer API fails and the older one copies.
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    return "Copied";
  } catch {
    const helper = element("textarea", { value: text, className: "llm-helper", ariaHidden: "true" });
    button.after(helper);
    helper.select();
    const isCopied = document.execCommand("copy");
    helper.remove();
    button.focus();
    return isCopied ? "Copied" : "This browser does not allow copying";
  }
}

function announce(status, message) {
  status.textContent = message;
  setTimeout(() => { status.textContent = ""; }, 3000);
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
  copies.addEventListener("click", async () => announce(status, await copy(model.get("value"), copies)));
  puts.addEventListener("click", async () => {
    const code = model.get("code");
    if (await intoNextCell(el, code)) announce(status, "Put into the next cell");
    else announce(status, `${await copy(code, puts)}: paste it into a cell`);
  });
  return follow(model, ["value", "code"], () => {
    shown.textContent = model.get("value");
    copies.hidden = model.get("value") === "";
    puts.hidden = model.get("code") === "";
  });
}

const kinds = { number, prompt, text, queue, conversation };

// Call `start` with the element around `el` that a selector finds, once `el` is in it; returns what ends that.
function whenAttached(el, selector, start) {
  let stop = null;
  const attached = new ResizeObserver(() => {
    const around = el.closest(selector);
    if (around && !stop) stop = start(around);
  });
  attached.observe(el);
  return () => {
    attached.disconnect();
    stop?.();
  };
}

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
    const unkept = whenAttached(el, ".llm-panel", (panel) => { keepKeys(panel); return () => {}; });
    const undo = kinds[model.get("kind")](context);
    return () => {
      unkept();
      undo();
    };
  },
};
