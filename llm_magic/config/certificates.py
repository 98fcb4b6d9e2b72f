"""The certificate authorities that the environment names for encrypted connections."""

from __future__ import annotations

import os
import ssl
from pathlib import Path


def certificate_problem() -> str:
    """Return one line about an unusable ``SSL_CERT_FILE`` or ``SSL_CERT_DIR``, or an empty string.

    The folder is used only if no file is named, as in huggingface_hub.
    """
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file:
        if not (why := _problem_of(file)):
            return ""
        return (
            f"SSL_CERT_FILE={file}: {why}. Name a file with certificates in PEM format,"
            " or unset SSL_CERT_FILE."
        )
    if folder and not any(Path(part).is_dir() for part in folder.split(os.pathsep)):
        return f"SSL_CERT_DIR={folder}: there is no such folder. Correct or unset SSL_CERT_DIR."
    return ""


def _problem_of(file: str) -> str:
    try:
        ssl.create_default_context(cafile=file)
    except ssl.SSLError:
        return "there is no certificate in it"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a null byte
        return str(error)
    return ""
