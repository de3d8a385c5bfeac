"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is no picture: a status, a sentence, and what a program can tell it by."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unavailable(message: str, code: str, seconds: float = 1) -> ApiError:
    """503: the same request can be sent again after so many seconds."""
    return ApiError(503, code, message, headers={"Retry-After": str(max(1, round(seconds)))})
