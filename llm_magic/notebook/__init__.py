"""All code that uses IPython or ipywidgets: magics, displayed answers, the control panel."""
