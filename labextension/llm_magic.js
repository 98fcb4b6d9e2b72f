// What JupyterLab does with `%%llm` cells: it highlights them as Markdown, not as Python. In a page that was
// loaded again, it continues the outputs that were not complete. It removes password boxes that nothing reads.
//
// JupyterLab gives every code cell the language of the kernel, does not save the ids of displays, and keeps
// the input box of a cell that was interrupted.
// This file is a prebuilt extension: a module federation container, written by hand so that nothing has
// to be built.

"use strict";

(() => {
  // The languages of code cells, of Markdown cells and of prompts.
  const PYTHON = "text/x-ipython";
  const MARKDOWN = "text/x-ipythongfm";
  const PROMPT = "text/x-llm-magic";
  // What IPython runs as this cell magic: blank lines may precede it, comments may not.
  const MAGIC = /^(?:[ \t]*\n)*[ \t]*%%llm(?=[ \n]|$)/;
  const followed = new WeakSet();

  // Add the language of prompts: Markdown without links, because [0] in {rows[0]} is none.
  function addPrompt(languages, { Language, LanguageSupport }) {
    languages.addLanguage({
      name: "prompt of llm_magic",
      mime: PROMPT,
      load: async () => {
        const { language, support } = (await languages.getLanguage(MARKDOWN)).support;
        const parser = language.parser.configure({ remove: ["Link", "LinkReference"] });
        return new LanguageSupport(new Language(language.data, parser), support);
      },
    });
  }

  // Set the language of a cell now and after each change of its text.
  function follow(cell) {
    if (cell.type !== "code" || followed.has(cell)) {
      return;
    }
    followed.add(cell);
    let usual = cell.mimeType;
    const update = () => {
      if (cell.mimeType !== PROMPT) {
        usual = cell.mimeType;
      }
      const wanted = MAGIC.test(cell.sharedModel.getSource()) ? PROMPT : usual;
      if (cell.mimeType !== wanted) {
        cell.mimeType = wanted;
      }
    };
    // The notebook sets the language of its kernel when the kernel is ready.
    cell.mimeTypeChanged.connect(update);
    cell.sharedModel.changed.connect((_model, change) => {
      if (change.sourceChange) {
        update();
      }
    });
    update();
  }

  // Follow the cells of a notebook, and those that are added to it.
  function followAll(cells) {
    cells.changed.connect((_cells, change) => change.newValues.forEach(follow));
    for (const cell of cells) {
      follow(cell);
    }
  }

  // The saved outputs whose end was not there when they were saved: [outputs of a cell, index, id].
  function unfinished(cells) {
    const found = [];
    for (const { outputs } of [...cells].filter((cell) => cell.type === "code")) {
      for (let index = 0; index < outputs.length; index++) {
        const id = outputs.get(index).metadata?.llm_magic?.display_id;
        if (id) {
          found.push([outputs, index, id]);
        }
      }
    }
    return found;
  }

  // Show the updates of the outputs with these ids, and ask the kernel for those that were missed.
  function resume(kernel, cells, ids) {
    kernel.iopubMessage.connect((_kernel, { header, content }) => {
      const id = content.transient?.display_id;
      if (header.msg_type !== "update_display_data" || !ids.has(id)) {
        return;
      }
      // Searched each time: cells move, and one that runs again has other outputs.
      for (const [outputs, index] of unfinished(cells).filter((found) => found[2] === id)) {
        const { data, metadata } = content;
        outputs.set(index, { output_type: "display_data", data, metadata });
      }
    });
    if (kernel.handleComms) {
      kernel.createComm("llm_magic.outputs").open({ display_ids: [...ids] });
    }
  }

  const outputs = {
    id: "llm-magic:outputs",
    description: "Completes the outputs that continued while the page was loaded again.",
    autoStart: true,
    activate: (app) => {
      app.docRegistry.addWidgetExtension("Notebook", {
        createNew: async (panel, context) => {
          await Promise.all([context.ready, panel.sessionContext.ready]);
          const kernel = panel.sessionContext.session?.kernel;
          const ids = new Set(unfinished(context.model.cells).map(([, , id]) => id));
          if (kernel && ids.size && !panel.isDisposed) {
            resume(kernel, context.model.cells, ids);
          }
        },
      });
    },
  };

  // One that was answered hides, and JupyterLab removes it.
  function isPasswordBox({ node }) {
    const { classList } = node;
    const isOpen = !classList.contains("jp-OutputArea-stdin-hiding");
    return isOpen && classList.contains("jp-OutputArea-stdin-item") && node.querySelector("input[type=password]");
  }

  // Remove the password boxes of cells that do not wait for one any more.
  function removeBoxes(cells) {
    const areas = cells.map((cell) => cell.outputArea).filter((area) => area && !area.pendingInput);
    for (const box of areas.flatMap((area) => [...area.widgets]).filter(isPasswordBox)) {
      const focused = document.activeElement;
      // JupyterLab sets the focus to its cell.
      box.dispose();
      if (focused?.isConnected) {
        focused.focus();
      }
    }
  }

  const boxes = {
    id: "llm-magic:password-boxes",
    description: "Removes the password boxes of cells that were interrupted.",
    autoStart: true,
    activate: (app) => {
      app.docRegistry.addWidgetExtension("Notebook", {
        createNew: (panel) => {
          panel.sessionContext.statusChanged.connect((_context, status) => {
            if (status === "idle" && !panel.isDisposed) {
              removeBoxes(panel.content.widgets);
            }
          });
        },
      });
    },
  };

  const plugin = {
    id: "llm-magic:prompt-cells",
    description: "Highlights %%llm cells as Markdown.",
    autoStart: true,
    activate: (app, languages) => {
      addPrompt(languages, codeMirror);
      // An editor shows the language that is loaded last, not the one that was set last. So cells are
      // changed only after both are loaded, in a task after that of the editors.
      const loaded = Promise.all([PYTHON, PROMPT].map((type) => languages.getLanguage(type)));
      const ready = loaded.then(() => new Promise((resolve) => setTimeout(resolve)));
      app.docRegistry.addWidgetExtension("Notebook", {
        createNew: (panel, context) => {
          ready.then(() => {
            if (!panel.isDisposed) {
              followAll(context.model.cells);
            }
          });
        },
      });
    },
  };

  let shared = {};
  let codeMirror = {};
  async function load(name) {
    const [module] = Object.values(shared[name]);
    return (await module.get())();
  }
  window._JUPYTERLAB = window._JUPYTERLAB || {};
  window._JUPYTERLAB["llm-magic"] = {
    init: (scope) => {
      shared = scope;
    },
    get: async () => {
      codeMirror = await load("@codemirror/language");
      plugin.requires = [(await load("@jupyterlab/codemirror")).IEditorLanguageRegistry];
      return () => [plugin, outputs, boxes];
    },
  };
})();
