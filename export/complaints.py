"""What an error of a runtime or of torch says, without its own coordinates."""

from __future__ import annotations

import re

_STATUS = re.compile(r".*?\[ONNXRuntimeError\] : \d+ : \w+ : ")
_FAILURE = re.compile(r".*?running (?P<operator>\w+) node\. Name:'[^']*' Status Message: ")
_PLACE = re.compile(r"\S*/\S+\.(?:cc|cpp|h|hpp):\d+ ")
_SIGNATURE = re.compile(r"(?:[\w:<>*&]+ )*onnxruntime::[\w:<>~]+\([^)]*\)(?: const)?(?: \[with [^\]]*\])? ?")
_LONGEST = 200


def complaint(error: BaseException) -> str:
    """Gist of an error of onnxruntime, in one line: the operator that fails and why.

    >>> status = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while "
    >>> complaint(RuntimeError(status + "running Pad node. Name:'pad' Status Message: /src/pad.h:7 too few entries"))
    'that Pad fails (too few entries)'
    """
    text = _STATUS.sub("", " ".join(str(error).split()), count=1)
    failure = _FAILURE.match(text)
    if failure is not None:
        text = text[failure.end() :]
    text = _SIGNATURE.sub("", _PLACE.sub("", text)).strip()[-_LONGEST:]
    if failure is None:
        return text or type(error).__name__
    return f"that {failure['operator']} fails" + (f" ({text})" if text else "")


def obstacle(error: BaseException) -> str:
    """What an export stumbled over, with a remedy where there is one."""
    cause = _innermost(error)
    untranslated = _UNTRANSLATED.search(str(cause))
    if untranslated:
        return f"{untranslated[1]}, which has no translation to ONNX; replace it (nothing was written)"
    if type(cause).__name__ == "GuardOnDataDependentSymNode":  # of a private module of torch
        return "a branch on what a tensor holds, as in `if mask.any()`; use torch.where (nothing was written)"
    return gist(cause)


_UNTRANSLATED = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


def gist(error: BaseException) -> str:
    """Innermost cause of an error, in one line."""
    error = _innermost(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
