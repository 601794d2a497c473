"""What other programs learnt becomes this pack's: a file of a Perfusion program, or a folder of the public E4T one."""

from pathlib import Path

from core import concept as concepts
from core import domain as domains
from core import host_diffusers, import_domain, importers
from core.compile import compiled
from core.concept import check_word
from core.encode import check
from core.tower import tokens_of

from . import pictures
from .album import square
from .encode import open_tower
from .learn import captions, open_model, target


def convert(arguments):
    """Turn what another program learnt into this pack's .safetensors: a Perfusion concept (.ckpt, .pt), or a folder of
    e4t-diffusion, which becomes a domain, or where it was tuned on a picture a concept."""
    folder = Path(arguments.file)
    if folder.is_dir() and not import_domain.is_tuned(folder):
        out = target(arguments.out, folder.name)
        learnt, notes = import_domain.pretrained(folder)
        size = f"{domains.save(learnt, out).stat().st_size / 2**20:.1f} MB"
    else:
        check_word(arguments.word)
        out = target(arguments.out, arguments.word.strip("<>"))
        learnt, notes = compile_folder(arguments) if folder.is_dir() else importers.convert(
            folder, arguments.word, arguments.superclass, arguments.index)
        size = f"{concepts.save(learnt, out).stat().st_size / 1024:.0f} KB"
    print(*notes, f"{out} ({size})", sep="\n")


def compile_folder(arguments):
    """The concept of a tuned folder, and notes."""
    missing = [f"--{name}" for name in ("model", "picture", "tower") if not getattr(arguments, name)]
    if missing:
        raise ValueError(f"A tuned folder needs {', '.join(missing)} too: the diffusers folder of the base that it was "
                         "tuned from, the picture (its domain.png), and a folder of the CLIP vision model.")
    domain, unet, notes = import_domain.tuned(arguments.file)
    pipe, folder = open_model(arguments.model)
    tower = open_tower(arguments.tower)
    host = host_diffusers.DiffusersHost(pipe, domain.superclass, folder, captions)
    check(domain, host.base, host.prediction, tower.hash, domain.superclass)
    own = {name: t.shape for name, t in pipe.unet.state_dict().items()}
    came = {name: t.shape for name, t in unet.items()}
    other = sorted(name for name in own | came if own.get(name) != came.get(name))
    if other:
        raise ValueError(f"unet.pt does not fit the UNet of '{arguments.model}': {len(other)} tensors differ, such as "
                         f"{other[0]}. Give the base that it was tuned from, {domain.training['model']}.")
    picture = square(pictures.read(arguments.picture), domain.training["resolution"])
    seen, latents = tokens_of(tower, picture, domain.encoder.read), host.latents(picture)
    base = {name: module.weight.detach().cpu().clone() for name, module in host.projections.items()}
    pipe.unet.load_state_dict(unet)
    with host.training(latents):
        concept = compiled(host, domain, seen, latents, arguments.word, base)
    return concept, notes[:1] + [
        "Lossy: the tuning changed the whole UNet and encodes anew at each step; of that remain a word embedding, and "
        "what the value projections answer at the word. Keys are locked to the word's own encoding.",
    ]
