"""Everything that knows IPython or ipywidgets."""
