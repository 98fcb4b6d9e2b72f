// Highlights `%%llm` cells as Markdown, not as Python, in JupyterLab.
//
// JupyterLab gives every code cell the language of the kernel. This file is a prebuilt extension: a
// module federation container, written by hand so that nothing has to be built.

"use strict";

(() => {
  // The languages of code cells and of Markdown cells.
  const PYTHON = "text/x-ipython";
  const PROMPT = "text/x-ipythongfm";
  // What IPython runs as this cell magic: blank lines may precede it, comments may not.
  const MAGIC = /^(?:[ \t]*\n)*[ \t]*%%llm(?=[ \n]|$)/;
  const followed = new WeakSet();

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

  const plugin = {
    id: "llm-magic:prompt-cells",
    description: "Highlights %%llm cells as Markdown.",
    autoStart: true,
    activate: (app, languages) => {
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
  window._JUPYTERLAB = window._JUPYTERLAB || {};
  window._JUPYTERLAB["llm-magic"] = {
    init: (scope) => {
      shared = scope;
    },
    get: async () => {
      const [codemirror] = Object.values(shared["@jupyterlab/codemirror"]);
      const { IEditorLanguageRegistry } = (await codemirror.get())();
      plugin.requires = [IEditorLanguageRegistry];
      return () => plugin;
    },
  };
})();
