"""What the pack costs, on random weights in the real shapes; writes bench/results/speed.json.

Figures are ratios of two things that take turns in one process: median and quartiles over the pairs. Time is CPU time
(idle threads sleep), which other work on the machine moves far less than wall time; its ratio stands beside it.
- Sampling: guided one-step samples of one prompt with three concepts, over those of the same model without any.
- Five steps: of Quick Tune with its batch of four, over four pictures of 25 guided steps, at the size that the model
  was made for: a step over a one-step sample of four, times 5/25.
- Step: one of Quick Tune over one of ComfyUI's Train LoRA node, both in fp32 without checkpointing; and, with no goal,
  over the node's defaults (bf16, the UNet checkpointed as a whole) and over its bypass mode in fp32.
- Memory: peak resident memory of two such steps, each in a fresh process, beyond the loaded model (the node loads two).
- Start: seconds that the host's loader takes for the pack in a fresh process, and over all that this did before.
"""

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # is read when torch is imported
import psutil  # noqa: E402
import torch  # noqa: E402

from headless.comfy import MISSING, ROOT, enter  # noqa: E402

enter(cpu=True) or sys.exit(MISSING)
sys.path.append(str(ROOT / "tests"))
import comfy.sample  # noqa: E402
import comfy.utils  # noqa: E402
from comfyui_version import __version__ as comfyui  # noqa: E402

import checkpoints  # noqa: E402

FOLDER, RESULTS = ROOT / "build" / "speed", ROOT / "bench" / "results" / "speed.json"
OWN_SIZE = {"sd1": 512, "sd2": 512, "sd2-v": 768, "sdxl": 1024}  # pixels a side
THINGS = {"<mimi>": "cat", "<rex>": "dog", "<ted>": "bear"}
PROMPT = "a photo of a {} beside a {}, and a {} behind them"
FP32 = {"training_dtype": "fp32", "lora_dtype": "fp32", "gradient_checkpointing": False}
PEERS = ("", FP32, 0.4), (", its defaults", {}, None), (", bypass mode", FP32 | {"bypass_mode": True}, None)


class Bench:
    """The checkpoint, loaded as the stock nodes load it, and what is measured on it. Used under inference mode."""

    def __init__(self, kind: str, path: Path, size: int):
        from perfusion.core.host_comfy import ComfyHost

        torch.set_num_threads(2)
        torch.manual_seed(0)
        logging.disable(logging.WARNING)
        comfy.utils.set_progress_bar_enabled(False)
        path.exists() or checkpoints.save_full(kind, path)
        self.model, self.clip, self.vae = checkpoints.load(path)
        self.of(size)
        self.host = ComfyHost(self.model, self.clip, self.vae, "cat", FOLDER)
        self.inverse, self.covariance, _ = self.host.inverse_covariance()

    def of(self, size: int):
        """Measure at another size from now on."""
        self.size, self.picture = size, torch.rand(1, size, size, 3)

    def encode(self, clip, text: str):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    def concept(self, word: str, superclass: str):
        """A concept made by hand: the word at its place in a caption, random value outputs."""
        from perfusion.core import apply, concept, key_lock

        target = self.encode(self.clip, f"a photo of a {superclass}")[0][0][0, 5].float()
        outputs = {name: torch.randn(to.out_features) for name, to
                   in apply.projections(self.model.model.diffusion_model).items() if name.endswith("to_v")}
        direction, energy = key_lock.direction(self.inverse, target)
        return concept.Concept(self.host.base, superclass, word, self.host.embedding(superclass), target, target,
                               direction.float(), outputs, energy, self.covariance)

    def sampler(self, samples: int, model, clip, words, pictures: int = 1):
        """A loop that draws guided one-step samples."""
        noise = comfy.sample.prepare_noise(latent := torch.zeros(pictures, 4, self.size // 8, self.size // 8), 0)
        conds = self.encode(clip, PROMPT.format(*words)), self.encode(clip, "blurry")
        return lambda done: [done(comfy.sample.sample(model, noise, 1, 6.0, "euler", "normal", *conds, latent,
                                                      disable_pbar=True)) for _ in range(samples)]

    def samplers(self, samples: int):
        """Loops: with three concepts, and without any."""
        from perfusion.core.apply import apply

        model, clip = self.model, self.clip
        for word, superclass in THINGS.items():
            model, clip = apply(model, clip, self.concept(word, superclass))
        return self.sampler(samples, model, clip, THINGS), self.plain(samples)

    def plain(self, samples: int, pictures: int = 1):
        return self.sampler(samples, self.model, self.clip, THINGS.values(), pictures)

    def tune(self, steps: int, done, batch: int = 1):
        from perfusion.core.tune import Tuning, tune

        tune(self.host, self.picture, "cat", "<mimi>", Tuning(steps, batch=batch, resolution=self.size), report=done)

    def lora(self, steps: int, options: dict, done):
        from comfy_extras.nodes_train import TrainLoraNode

        inputs = {i.id: getattr(i, "default", None) for i in TrainLoraNode.define_schema().inputs} | {
            "model": self.model, "latents": {"samples": self.vae.encode(self.picture)}, "steps": steps,
            "positive": self.encode(self.clip, "a photo of a cat"),
        } | options
        comfy.utils.set_progress_bar_global_hook(done)
        TrainLoraNode.execute(**{name: [value] for name, value in inputs.items()})


def in_turn(*loops) -> list[torch.Tensor]:
    """Ratios (CPU, wall) of two loops' steps after the first. Each has a thread, and its turn until it calls back."""
    def clock():
        return torch.tensor([time.process_time(), time.perf_counter()], dtype=torch.float64)

    def run(k):
        def done(*_, **__):
            nonlocal begun
            times[k].append(clock() - begun)
            turns[1 - k].release()
            turns[k].acquire()
            begun = clock()

        turns[k].acquire()
        try:
            with torch.inference_mode():
                loops[k](done)
        finally:
            turns[1 - k].release(1000)  # the other goes on alone, if this one failed

    turns, times, begun = [threading.Semaphore(1), threading.Semaphore(0)], ([], []), clock()
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, range(2)))
    return [one / other for one, other in list(zip(*times))[1:]]


def peak(where, name: str, *options) -> int:
    """Bytes of resident memory that two steps of `tune` or `lora` need at their peak, beside the model."""
    with torch.inference_mode():
        bench, memory = Bench(*where), psutil.Process().memory_info
        seen = [memory().rss]
        ticks = iter(partial(time.sleep, 0.002), 0)  # for as long as the process lives
        threading.Thread(target=lambda: [seen.append(memory().rss) for _ in ticks], daemon=True).start()
        getattr(bench, name)(2, *options, lambda *_, **__: None)
        return max(seen) - seen[0] - (bench.model.model_size() if name == "lora" else 0)


def start() -> tuple[float, float]:
    """Seconds that the pack takes to load, and the age of the process when it has."""
    import comfy_config.config_parser  # noqa: F401
    import server

    server.PromptServer(asyncio.new_event_loop())  # not started; it is where the pack adds its routes
    with tempfile.TemporaryDirectory() as server.folder_paths.models_dir:  # the pack makes its folders there
        begun = time.perf_counter()
        assert asyncio.run(server.nodes.load_custom_node(str(ROOT))), "the host could not load the pack"
        return time.perf_counter() - begun, time.time() - psutil.Process().create_time()


def row(name: str, values, goal=None) -> dict:
    """A row, printed too. `values` are numbers, or tensors (CPU, wall)."""
    numbers = torch.stack([torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in values])
    low, middle, high = numbers[:, 0].quantile(numbers.new_tensor([0.25, 0.5, 0.75])).tolist()
    wall = f"{numbers[:, 1].quantile(0.5):8.3f}" if numbers.shape[1] > 1 else ""
    print(f"{name:55}{middle:7.3f}{low:7.3f}{high:7.3f}{len(values):6}{goal or '':8}{wall}", flush=True)
    return {"name": name, "ratio": middle, "low": low, "high": high, "runs": len(values), "goal": goal}


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=9, help="pairs of steps, three times as many of samples")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--kind", default="sd1", help="sd1, sd2, sd2-v or sdxl")
    parser.add_argument("--checkpoint", type=Path, help="instead of random weights of that kind")
    given = parser.parse_args()
    checkpoint = given.checkpoint or ROOT / "build" / f"{given.kind}-random.safetensors"
    n, where = given.runs, (given.kind, checkpoint, given.size)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "captions.txt").write_text(PROMPT.replace(" ", "\n"), encoding="utf-8")  # any will do here
    print(f"{'':55} median    quartiles   runs at most    wall")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        starts = [fresh.apply(start) for _ in range(n + 1)][1:]  # the first may have to write bytecode
        peaks = [fresh.apply(peak, (where, "tune")) / fresh.apply(peak, (where, "lora", FP32)) for _ in range(2)]
    rows = [row("seconds that the pack adds to ComfyUI's start", [pack for pack, _ in starts], 0.2),
            row("the same / all that came before", [pack / (age - pack) for pack, age in starts]),
            row("memory of a step, Quick Tune / Train LoRA", peaks, 1)]
    with torch.inference_mode():
        bench = Bench(*where)
        rows += [row("sampling, three concepts / none", in_turn(*bench.samplers(3 * n + 1)), 1.01)]
        bench.of(OWN_SIZE[given.kind])  # before what needs more memory: where it is short, blocks are computed again
        found = in_turn(partial(bench.tune, n // 2 + 2, batch=4), bench.plain(n // 2 + 2, pictures=4))
        rows += [row("five steps of Quick Tune / four pictures of 25 steps", [5 / 25 * ratio for ratio in found], 0.25)]
        bench.of(given.size)
    for peer, options, goal in PEERS:
        count = n + 1 if goal else n // 2 + 2
        loops = partial(bench.tune, count), partial(bench.lora, count, options)
        rows += [row(f"time of a step, Quick Tune / Train LoRA{peer}", in_turn(*loops), goal)]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    cpu = re.findall("model name.*: (.*)", cpus.read_text()) if (cpus := Path("/proc/cpuinfo")).exists() else []
    machine = {"cpu": "".join(cpu[:1]), "cores": os.cpu_count(), "torch": torch.__version__, "comfyui": comfyui}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"commit": commit.strip(), "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
