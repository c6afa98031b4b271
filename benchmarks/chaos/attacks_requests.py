"""Attacks on the pages by a single request: routes, names and other sites."""

from __future__ import annotations

from benchmarks.chaos.attack import EVENT, JOIN, PREDICT, Try, get, post, refused
from benchmarks.chaos.raw_http import multipart, post_json, request

_UPLOAD, _FORM = multipart({}, "a.bin", 500_000)
ROUTES: dict[str, Try] = {
    "read a file": get("/gradio_api/file=SECRET"),
    "read a file, old route": get("/gradio_api/file/SECRET"),
    "read a file, no prefix": get("/file=SECRET"),
    "read a file, other letters": get("/gradio_api/%66ile=SECRET"),
    "read a file, two slashes": get("//gradio_api//file=SECRET"),
    "read a file, up from static": refused(
        *(request("GET", f"/static/{up * 9}SECRET") for up in ("../", "%2e%2e/", "..\\"))
    ),
    "read a file, up from assets": refused(
        *(request("GET", f"/assets/{up * 9}SECRET") for up in ("../", "..%2f", "..%5c"))
    ),
    "read a file, up from svelte": get("/svelte/../../../SECRET"),
    "read a hidden file": get("/assets/.env"),
    "upload": refused(request("POST", "/gradio_api/upload", _UPLOAD, headers=_FORM)),
    "upload from another site": refused(
        request("POST", "/gradio_api/upload?upload_id=a", _UPLOAD, headers={**_FORM, "origin": "http://evil.example"})
    ),
    "upload progress": get("/gradio_api/upload_progress?upload_id=a"),
    "fetch from elsewhere": get("/gradio_api/proxy=http://169.254.169.254/latest/meta-data"),
    "stream": get("/gradio_api/stream/s/0/0/playlist.m3u8"),
    "code of a component": get("/gradio_api/custom_component/textbox/server/component/index.js"),
    "call a component": post("/gradio_api/component_server", {"session_hash": "s", "component_id": 1, "fn_name": "ls"}),
    "save a deep link": get("/gradio_api/deep_link?session_hash=s"),
    "open a deep link": get("/?deep_link=..%2f..%2fstate"),
    "configuration": get("/config"),
    "interface": get("/gradio_api/info"),
    "schema": get("/gradio_api/openapi.json"),
    "documentation": refused(*(request("GET", path) for path in ("/docs", "/redoc", "/openapi.json"))),
    "monitoring": refused(*(request("GET", path) for path in ("/monitoring", "/monitoring/summary", "/monitoring/x"))),
    "recording": refused(request("POST", "/gradio_api/process_recording", _UPLOAD, headers=_FORM)),
    "history of runs": refused(*(request("GET", f"/gradio_api/{path}") for path in ("runs", "run-history/buckets"))),
    "connect a history": post("/gradio_api/run-history/connect", {"bucket": "evil"}),
    "read the code": get("/gradio_api/vibe-code"),
    "write the code": post("/gradio_api/vibe-code", {"code": "import os"}),
    "have the code rewritten": post("/gradio_api/vibe-edit", {"prompt": "open a shell"}),
    "take code back": post("/gradio_api/undo-vibe-edit"),
    "ask for ideas": post("/gradio_api/vibe-starter-queries"),
    "reload": get("/gradio_api/dev/reload"),
    "profile": refused(*(request("GET", f"/gradio_api/profiling/{path}") for path in ("traces", "summary"))),
    "clear the profile": post("/gradio_api/profiling/clear"),
    "tools for agents": refused(*(request("GET", f"/gradio_api/mcp{path}") for path in ("", "/", "/sse", "/schema"))),
    "direct call": post("/gradio_api/call/press_u", {"data": [""]}),
    "direct call, second form": post("/gradio_api/call/v2/press_u", {"key": ""}),
    "direct call, old form": post("/gradio_api/api/press_u", {"data": [""]}),
    "who is here": refused(
        *(request("GET", f"/gradio_api/{path}") for path in ("token", "user", "app_id", "login_check"))
    ),
    "start again": get("/gradio_api/startup-events"),
    "state of the queue": get("/gradio_api/queue/status"),
    "application": refused(*(request("GET", path) for path in ("/manifest.json", "/pwa_icon", "/robots.txt"))),
    "other methods": refused(*(request(method, "/") for method in ("PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"))),
    "websocket": refused(
        request(
            "GET",
            "/gradio_api/ws",
            headers={"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"},
        )
    ),
}
_PORTS = (
    "evil.example",
    "evil.example:80",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "0.0.0.0",
    "localhost@evil",
)
NAMES: dict[str, Try] = {
    "a name of others": refused(*(request("GET", "/", host=host) for host in _PORTS), status=421),
    "a proxy's name": refused(request("GET", "/", headers={"x-forwarded-host": "localhost, evil.example"}), status=421),
    "no name": refused(b"GET / HTTP/1.0\r\n\r\n", status=421),
    "two names": refused(
        b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\nconnection: close\r\n\r\n", status=400
    ),
    "a name in the path": refused(request("GET", "http://evil.example/"), status=404),
}
_SITES = ("http://evil.example", "null", "http://localhost:3000", "https://localhost.evil.example")
_CROSS = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
SITES: dict[str, Try] = {
    "an event from another site": refused(
        *(post_json(path, EVENT, headers={"origin": site}) for site in _SITES for path in (JOIN, PREDICT)), status=403
    ),
    "an event as plain text": refused(
        post_json(JOIN, EVENT, headers={"content-type": "text/plain"} | _CROSS), status=403
    ),
    "a stream into another site": refused(
        request("GET", "/gradio_api/heartbeat/s", headers=_CROSS | {"sec-fetch-site": "same-site"}),
        request("GET", "/gradio_api/queue/data?session_hash=s", headers=_CROSS),
        status=403,
    ),
    "a frame in another site": refused(
        request("GET", "/", headers=_CROSS | {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}), status=403
    ),
    "leave to read": refused(
        request("OPTIONS", JOIN, headers={"origin": "http://evil.example", "access-control-request-method": "POST"})
    ),
}
