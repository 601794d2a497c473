"""ComfyUI's real server with the pack in it, on a folder of its own."""

import json
import socket
import time
import urllib.error
import urllib.request
from contextlib import contextmanager


class Server:
    """Speaks to a running ComfyUI."""

    def __init__(self, port, base):
        self.url, self.base = f"http://127.0.0.1:{port}", base

    def call(self, path, body=None):
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def queue(self, graph):
        return self.call("/prompt", {"prompt": graph})["prompt_id"]

    def wait(self, prompt_id, seconds=180):
        for _ in range(seconds * 10):
            history = self.call(f"/history/{prompt_id}")
            if history:
                run = history[prompt_id]
                errors = [m[1] for m in run["status"]["messages"] if m[0] == "execution_error"]
                return run["status"]["status_str"], run["outputs"], errors
            time.sleep(0.1)
        raise AssertionError("the run did not end")

    def run(self, graph):
        return self.wait(self.queue(graph))


@contextmanager
def serving(base, serve=None):
    """A Server while the block is open, with the pack of the `serve` that starts it, or with this one."""
    if not serve:
        from perfusion.headless.comfy import serve

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process, talk = serve(base, port), Server(port, base)
    try:
        for _ in range(600):
            try:
                talk.call("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "the server ended"
                time.sleep(0.2)
        yield talk
    finally:  # else a failed command would leave it running
        process.terminate()
        process.wait(20)


def as_prompt(workflow, info):
    """A saved workflow as the screen queues it: links and widgets by name."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for box in workflow["nodes"]:
        if box["type"] == "MarkdownNote":
            continue
        kind, values = info[box["type"]], iter(box["widgets_values"])
        linked = {socket["name"]: links[socket["link"]] for socket in box["inputs"] if socket["link"]}
        given = {}
        for name, (of, *options) in {**kind["input"]["required"], **kind["input"].get("optional", {})}.items():
            options = options[0] if options else {}
            widget = isinstance(of, list) or of in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            if name in linked:
                given[name] = linked.pop(name)
            elif widget and not options.get("forceInput"):
                choices = of if isinstance(of, list) else options.get("options")
                given[name] = next(values, options.get("default", (choices or [None])[0]))  # the default, if it is new
                if options.get("control_after_generate") or box["type"] == "KSampler" and name == "seed":
                    next(values, None)
        assert not linked, f"{box['type']} has no {linked}"
        assert list(values) in ([], ["image"]), f"{box['type']} has more widgets than inputs"  # the upload button
        prompt[str(box["id"])] = {"class_type": box["type"], "inputs": given}
    return prompt
