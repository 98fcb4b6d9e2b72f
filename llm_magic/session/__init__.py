"""The Python API: a session, its requests and responses, chats and jobs."""

import time

from llm_magic.session.session import Session, kernel_session

__all__ = ["IMPORTED_AT", "Session", "kernel_session"]

# When the code of this package was read: ``%reload_ext`` reports later changes, and does not use them.
IMPORTED_AT = time.time()
