"""One server, a thousand runs: equal ones draw equal pictures, memory stays, and nothing is left on the models.

Kinds of runs (soaked.py) come in rounds, each in an order of its own. The host keeps what nodes of equal inputs gave,
and as users have it so, most of the soak has. Sampler and Quick Tune have to run each time all the same: they get one
input more, `run`, which no node has and which the host compares and then drops. After some rounds it is told to unload
and forget everything, as by its button. A second server keeps nothing at all: each run loads the model anew and throws
it away, so that what a run left behind there would be a whole model. (What it does leave there, 36 KB a run, is not the
pack's: safetensors 0.8.0 keeps 62 bytes of each tensor that it reads from a file, whoever asks.)
"""

import hashlib
import random
import time
from collections import Counter
from pathlib import Path
from statistics import median

import psutil
import pytest
from PIL import Image

import soaked
from served import serving
from soaked import KINDS, WORDS

pytestmark = pytest.mark.host
SOAK = pytest.mark.soak
TESTS = Path(__file__).parents[1]
NODES = f"import sys\nsys.path.append({str(TESTS)!r})\nimport looking\nlooking.register()\nNODE_CLASS_MAPPINGS = {{}}\n"
SEEDS = 1, 2
FORGET = 8  # rounds after which the host is told to unload and forget all, as its button does
SPAN = 100  # runs over which the median of resident memory is taken; as many come first, to warm up
MOST = 1.02  # resident memory at the end over that after warming up
NEAR = 3  # steps after which a cancel comes


@pytest.fixture
def server(tmp_path, request):
    """With a LoRA in its list, and a look inside; the parameter is what it is started with."""
    from perfusion.headless.comfy import serve

    for place in "custom_nodes/looking", "models/loras":
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "custom_nodes/looking/__init__.py").write_text(NODES)
    soaked.save_lora(tmp_path / "models/loras" / soaked.LORA)
    with serving(tmp_path, lambda base, port: serve(base, port, *request.param)) as talk:
        yield talk


class Soak:
    """Queues runs to a server, and keeps what they drew and what they left."""

    def __init__(self, server):
        self.server, self.drawn, self.runs, self.equal, self.resident = server, {}, Counter(), 0, []
        self.tuned = None  # the seed of what is found on disk
        self.process = psutil.Process(server.call("/soak/alive")["pid"])

    def run(self, name, seed):
        kind, number = KINDS[name], len(self.resident)
        seed = self.tuned if kind.like == "tune" else seed
        self.tuned = seed if name == "tune" else self.tuned
        graph = kind.graph(seed)
        for box in graph.values():
            if box["class_type"] in ("KSampler", "PerfusionQuickTune"):
                box["inputs"]["run"] = number
        learnt = self.learnt(anew=name == "tune")
        running = self.server.queue(graph)
        if kind.cancelled:
            self.cancel(running, kind.cancelled)
        status, outputs, errors = self.server.wait(running)
        what = f"run {number}, {name}, seed {seed}: {status} {errors}"
        if kind.refused:
            assert kind.refused in errors[0]["exception_message"], what
        elif kind.cancelled:
            assert status == "error" and not errors, what
        else:
            assert status == "success", what
            assert not self.found(running) & {"sampler", "tune"}, f"{what}, but the host had kept it"
            pictures = [self.pixels(picture) for shown in ("saved", "map") if shown in outputs
                        for picture in outputs[shown]["images"]]
            self.equal += (kind.like or name, seed) in self.drawn
            assert pictures == self.drawn.setdefault((kind.like or name, seed), pictures), what
        assert (self.learnt() != learnt) == (name == "tune"), f"{what}: what is learnt is written, and nothing else is"
        self.runs[name] += 1
        self.resident.append(self.process.memory_info().rss / 2**20)

    def learnt(self, anew=False):
        """The finished tunes on disk, none of them if it is to be learnt anew."""
        cache = self.server.base / "models/perfusion/cache"
        for path in cache.glob("*") if anew else ():
            path.unlink()
        return {(path.name, path.stat().st_mtime_ns) for path in cache.glob("*")}

    def cancel(self, running, node):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            now = self.server.call("/soak/progress")
            if now["prompt"] == running and now["steps"].get(node, 0) >= NEAR:
                return self.server.call("/interrupt", {})
            time.sleep(0.01)
        raise AssertionError(f"{node} did not begin")

    def found(self, running):
        """The nodes of a run that the host had kept."""
        messages = self.server.call(f"/history/{running}")[running]["status"]["messages"]
        return {node for kind, told in messages if kind == "execution_cached" for node in told["nodes"]}

    def pixels(self, picture):
        path = self.server.base / "output" / picture["filename"]
        return hashlib.sha256(Image.open(path).convert("RGB").tobytes()).hexdigest()

    def forget(self):
        self.server.call("/free", {"unload_models": True, "free_memory": True})

    def look(self):
        """Inside, after a plain run, and then once more when the host has forgotten all models."""
        self.run("base", SEEDS[0])
        working = self.server.call("/soak/alive")
        self.forget()
        for _ in range(100):
            forgotten = self.server.call("/soak/alive")
            if not forgotten["counts"].get("patchers"):
                break
            time.sleep(0.1)
        return working, forgotten


def rounds(count):
    """So many runs (name, seed) in rounds of all kinds, each in an order of its own. A seed is kept for two rounds."""
    order = random.Random(0)
    for number in range(0, count, len(KINDS)):
        names = order.sample([*KINDS], min(len(KINDS), count - number))
        yield [(name, SEEDS[number // len(KINDS) // 2 % len(SEEDS)]) for name in names]


@pytest.mark.parametrize("server, runs, heading", [
    pytest.param((), 2 * len(KINDS), "a share", id="share"),
    pytest.param((), 1000, "one server", id="all", marks=SOAK),
    pytest.param(("--cache-none",), 400, "one server without the host's cache", id="no-cache", marks=SOAK),
], indirect=["server"])
def test_equal_runs_draw_equal_pictures_and_leave_memory_and_models_as_they_were(server, runs, heading, tally):
    soak = Soak(server)
    before = soak.look()
    for word in WORDS:
        status, _, errors = server.run(soaked.encoded(word))
        assert status == "success", errors
    soak.run("tune", SEEDS[0])
    for number, names in enumerate(rounds(runs), 1):
        for name, seed in names:
            soak.run(name, seed)
        server.call("/history", {"clear": True})  # which the host keeps of ten thousand runs, and which is not ours
        if number % FORGET == 0:
            soak.forget()
    after = soak.look()

    for was, now in zip(before, after):
        # the host has that on where it will never learn, and a tune takes it away
        assert now["counts"].pop("learning") <= was["counts"].pop("learning")
        assert now == was
    assert before[0]["ours"]["type"] and not before[0]["patched"]
    first = {name: pictures[0] for (name, seed), pictures in soak.drawn.items() if seed == SEEDS[0]}
    assert first.pop("trace") == first["three concepts"] and len({*first.values()}) == len(first)
    if runs < 3 * SPAN:
        return  # too few to say of memory
    warm, last = median(soak.resident[SPAN : 2 * SPAN]), median(soak.resident[-SPAN:])
    assert last / warm <= MOST
    tally(heading, **{f"of {name}": count for name, count in soak.runs.items()}, **{
        "runs": len(soak.resident), "equal to an earlier one": soak.equal, f"MB after {SPAN}": round(warm, 1),
        "MB at the end": round(last, 1), "MB at most": round(max(soak.resident), 1)})
    for when, (_, looked) in ("at first", before), ("at the end", after):
        tally(heading, **{f"alive {when}, of the pack": sum(looked["ours"].values()),
                          f"alive {when}, tensors": looked["counts"]["tensors"]})
