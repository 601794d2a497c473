"""What the node shows while it works: time left, the loss curve, and the picture before and after."""

import base64
import io as bytes_io

import numpy as np
import torch
from comfy.utils import ProgressBar
from comfy_execution.utils import get_executing_context
from PIL import Image, ImageDraw, ImageOps
from server import PromptServer

CURVE = "strengths", "likeness", "obedience"  # of a concept's fidelity curve
SIDE = 256  # pixels of each part of the sheet


def tell(node_id: str, text: str):
    """Show a line of text under the node."""
    PromptServer.instance.send_progress_text(text, node_id)


def gate(concept, carried: float) -> dict:
    """What Gate Strength's chart (web/gate_strength.js) knows of a concept and its dial; word and energy say which.
    `carried` is the strength that the concept came with."""
    curve = concept.fidelity
    return {"carried": carried, "fidelity": curve and {name: getattr(curve, name) for name in CURVE},
            "word": concept.word, "energy": concept.energy, "superclass": concept.superclass, "off": concept.off,
            "blank": concept.blank, "bias": concept.gate_bias, "temperature": concept.temperature,
            "scale": concept.scale}


def gate_listener(concept) -> tuple:
    """(listener, prompts): the listener tells the chart of every prompt that is encoded what the concept's gate sees of
    it, and keeps it in `prompts` by the node that encodes it."""
    prompts = {}

    def heard(words, weight):
        server, node = PromptServer.instance, get_executing_context().node_id
        prompts[node] = {"word": concept.word, "energy": concept.energy, "by": node, "words": words, "weight": weight}
        server.send_sync("perfusion.gate", prompts[node], server.client_id)

    return heard, prompts


def to_pil(image: torch.Tensor) -> Image.Image:
    """The first of images (m, H, W, 3) in 0..1."""
    return Image.fromarray((image[0, ..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy())


def jpeg(image: torch.Tensor) -> str:
    """Base64 of a small JPEG of an image (m, H, W, 3) in 0..1."""
    picture, out = to_pil(image), bytes_io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()


def drawing(node_id: str):
    """A listener to pictures (picture, done, all) that are drawn one after the other: it shows the last one."""
    bar = ProgressBar(1, node_id=node_id)

    def drew(made, done, total):
        tell(node_id, f"Picture {done} of {total}")
        bar.update_absolute(done, total, ("JPEG", to_pil(made), SIDE))

    return drew


def curve(losses: list[float], steps: int) -> Image.Image:
    """The loss of each step so far, and its running mean, over the steps to come."""
    picture = Image.new("RGB", (SIDE, SIDE), "#202020")
    draw = ImageDraw.Draw(picture)
    low, high = min(losses), max(losses)
    height = (high - low) or 1.0
    mean = [sum(losses[max(0, i - 9) : i + 1]) / len(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
    for values, colour, width in ((losses, "#606060", 1), (mean, "#f0a030", 3)):
        points = [(8 + (SIDE - 16) * i / max(1, steps - 1), SIDE - 24 - (SIDE - 48) * (v - low) / height)
                  for i, v in enumerate(values)]
        draw.line(points * (2 if len(points) == 1 else 1), colour, width)
    draw.text((8, 4), f"loss {mean[-1]:.4f}", "white")
    draw.text((8, SIDE - 18), f"step {len(losses)} of {steps}", "white")
    return picture


def sheet(*pictures: Image.Image) -> Image.Image:
    """Pictures two by two, which a node shows larger than a row, each fitted into a square."""
    whole = Image.new("RGB", (2 * SIDE, (len(pictures) + 1) // 2 * SIDE), "#202020")
    for i, picture in enumerate(pictures):
        picture = ImageOps.contain(picture, (SIDE, SIDE))
        x, y = (SIDE - picture.width) // 2, (SIDE - picture.height) // 2
        whole.paste(picture, (i % 2 * SIDE + x, i // 2 * SIDE + y))
    return whole


class Watch:
    """Listens to a tune on behalf of a node, and draws what it hears."""

    def __init__(self, node_id: str, images: torch.Tensor):
        self.node_id, self.images, self.drawn, self.losses, self.steps = node_id, images, [], [], 0
        self.noted = []
        self.bar = ProgressBar(1, node_id=node_id)

    def captions(self, done: int, total: int):
        """The covariance is being computed."""
        tell(self.node_id, f"Reading captions, once for this text encoder: {done} of {total}")
        self.bar.update_absolute(done, total)

    def picture(self, made: torch.Tensor):
        """What the model makes of the superclass word, before it has learnt anything; then of the word, in between."""
        self.drawn = [*(self.drawn or [to_pil(self.images)])[:2], to_pil(made)]

    def note(self, text: str):
        """Something that is to be known of the tune, from before its first step to its end."""
        self.noted.append(text)
        tell(self.node_id, text)

    def step(self, progress):
        """A step is done."""
        self.losses, self.steps = progress.losses, progress.steps
        left = progress.seconds_left
        now = (f"Step {progress.step} of {progress.steps}, "
               f"{f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'} left.")
        tell(self.node_id, "\n".join([now, *self.noted]))  # Nodes 2.0 shows all of it as one line
        parts = [*self.drawn, curve(self.losses, self.steps)]
        self.bar.update_absolute(progress.step, progress.steps, ("JPEG", sheet(*parts), 2 * SIDE))

    def school(self, schooled):
        """A step of a domain is done."""
        left = schooled.seconds_left
        tell(self.node_id, f"Step {schooled.step} of {schooled.steps}, error {schooled.numbers['error']:.4f}, "
                           f"{f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'} left")
        self.bar.update_absolute(schooled.step, schooled.steps)

    def result(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """The sheet that stays on the node (1, H, W, 3): photo, before, after, and the curve if there is one."""
        parts = [to_pil(images) for images in (self.images, before, after)]
        whole = sheet(*parts, *([curve(self.losses, self.steps)] if self.losses else []))
        return torch.from_numpy(np.asarray(whole).astype(np.float32) / 255)[None]
