"""A real HTTP server on a free port of loopback, for what speaks to other machines."""

import http.server
import json
import threading


class Server(http.server.ThreadingHTTPServer):
    """answer(path, body, how many requests there were) -> (status, object). `seen` keeps the
    requests: (path, headers, body)."""

    def __init__(self, answer):
        self.seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.server.seen.append((self.path, dict(self.headers), body))
                status, thing = answer(self.path, body, len(self.server.seen))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(thing).encode())

            do_POST = do_GET

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *args):
        self.shutdown()
        super().__exit__(*args)
