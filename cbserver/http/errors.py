"""Every answer that is not 200, in OpenAI's shape: what was wrong, which field, what to do."""
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

MEANINGS = {400: "a field is wrong, or not supported", 401: "no key, or a wrong one",
            404: "another model", 408: "the deadline has passed", 413: "too large",
            429: "the queue is full", 500: "the engine failed", 503: "not serving"}
DOCUMENTED = {status: {"description": meaning} for status, meaning in MEANINGS.items()}


class APIError(HTTPException):
    """An answer other than 200 in OpenAI's shape: what was wrong, and which field."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        kind = "invalid_request_error" if status < 429 else "server_error"
        if status == 408:
            kind = "timeout_error"
        body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(status, body, headers)


async def refused(request, error):
    """Any error as JSON in OpenAI's shape; what nobody foresaw is a 500 that tells no secrets."""
    if not isinstance(error, HTTPException):
        error = APIError(500, "internal error; see the server's log")
    elif not isinstance(error, APIError):
        error = APIError(error.status_code, explained(request, error), headers=error.headers)
    request.app.state.monitor.refuse(error.status_code)
    return JSONResponse(error.detail, error.status_code, error.headers)


def explained(request, error):
    """What is said of what came to no route, in place of FastAPI's own words."""
    if error.status_code == 400:
        return ("the body cannot be read: it is no JSON in UTF-8, is nested too deeply, or has a "
                "number of thousands of digits")
    if error.status_code not in (404, 405):
        return str(error.detail)
    paths = request.app.openapi()["paths"]
    routes = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    asked = f"{request.method} {request.url.path[:100]!r}"
    return f"there is no {asked}; there are {', '.join(routes)}"


async def invalid(request, error):
    """FastAPI's own checks of a body, as a 400; a field of several types has several reasons."""
    errors = error.errors()
    first = errors[0]
    sent = request.headers.get("content-type", "")
    if "json" not in sent:
        named = sent or "none"
        return await refused(request, APIError(
            400, f"send the header Content-Type: application/json (it was {named[:100]})"))
    if first["type"] == "json_invalid":
        where = f"{first['ctx']['error']} at character {first['loc'][1]}"
        return await refused(request, APIError(400, f"the body is not JSON: {where}"))
    param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    reasons = [e["msg"].removeprefix("Value error, ") for e in errors if param is None or param in map(str, e["loc"])]
    different = dict.fromkeys(reasons)
    return await refused(request, APIError(
        400, f"{param or 'body'}: {', or: '.join(different)}", param))


HANDLERS = {RequestValidationError: invalid, HTTPException: refused, Exception: refused}
