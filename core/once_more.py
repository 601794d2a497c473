"""A tune that runs out of memory is begun once more in less of it, and says so.

Less is the UNet's blocks computed again on the way back, from their inputs alone, which changes nothing that is learnt;
and where that was so already, three quarters of the resolution. Samples are learnt from one at a time in any case. It
begins anew with the same seed, so that what it learns depends on what it was given, and not on where memory ran out.
"""

from collections.abc import Callable
from dataclasses import replace

from .concept import Concept
from .file import brief
from .host import Host
from .tune import SMALLEST, Tuning

SHARE = 0.75  # of the resolution
FACT = "out_of_memory"  # in a concept's training: what was done about it


def once_more(host: Host, learn: Callable[[Tuning, bool], Concept], settings: Tuning,
              note: Callable[[str], None]) -> Concept:
    """What `learn(settings, tight)` answers, asked a second time where memory runs out. `note` hears of that.

    Raises what `learn` does; where memory runs out twice, the host's error with a sentence.
    """
    try:
        return learn(settings, False)
    except host.out_of_memory as error:
        trouble = brief(error)
    # only here are the frames of what failed gone, and their tensors with them
    lower = max(SMALLEST, int(settings.resolution * SHARE) // 64 * 64) if host.tight else settings.resolution
    if host.tight and lower == settings.resolution:
        raise host.out_of_memory(f"Memory ran out ({trouble}), and at {lower} pixels nothing less can be tried. Close "
                                 "what else uses the card, or learn on a larger one.")
    done = f"learnt at {lower} pixels" if lower < settings.resolution else "learnt with less memory and more time"
    note(f"Memory ran out. Once more from the beginning, {done}.")
    host.spare()
    try:
        concept = learn(replace(settings, resolution=lower), True)
    except host.out_of_memory as error:
        error.args = (f"Memory ran out twice, the second time {done} ({trouble}). The model is as it was. Lower the "
                      f"resolution from {settings.resolution}, close what else uses the card, or learn on a larger "
                      "one.",)
        raise
    return concept.replace(training=concept.training | {FACT: done})
