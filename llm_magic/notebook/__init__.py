"""All code that uses IPython or ipywidgets: magics, displayed answers, the control panel."""

import time

# When the code of this package was read: ``%reload_ext`` imports it again if it has changed since.
IMPORTED_AT = time.time()
