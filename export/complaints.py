"""What an error of a runtime says, without its own coordinates."""

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
