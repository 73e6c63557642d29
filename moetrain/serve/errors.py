"""Errors of the API, in the form that OpenAI's clients expect."""

from typing import Any

_LONGEST_MESSAGE = 1000  # characters; a client's own text may be in it


class ApiError(Exception):
    """A request that cannot be answered. param: the field at fault. code: a word for programs.

    may_retry: whether the same request may succeed later; clients of OpenAI read it from the headers.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        may_retry: bool = False,
    ) -> None:
        message = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
        super().__init__(message)
        self.status = status
        self.may_retry = may_retry
        self.body: dict[str, Any] = {"error": {"message": message, "type": _type(status), "param": param, "code": code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response. `x-should-retry: false` keeps clients from repeating a request that has run."""
        headers = {"retry-after": "1"} if self.may_retry else {"x-should-retry": "false"}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 404:
        return "not_found_error"
    return "invalid_request_error" if status < 500 else "server_error"
