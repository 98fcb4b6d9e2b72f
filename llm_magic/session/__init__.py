"""The Python API: a session, its requests and responses, chats and jobs."""

from llm_magic.session.session import Session, kernel_session

__all__ = ["Session", "kernel_session"]
