"""The nodes, in the order in which an artist meets them."""

from comfy_api.latest import ComfyExtension
from server import PromptServer

from . import routes
from .concept import ApplyConcept, GateStrength, LoadConcept, SaveConcept
from .demo import DemoModel, DemoPicture
from .doctor import ConceptDoctor
from .domain import EncodeConcept, LoadDomain, TrainDomain
from .fidelity import FidelityCurve
from .folders import register
from .learn import QuickTune
from .sweep import GateSweep
from .where import TraceConcepts, WhereItActed


class PerfusionExtension(ComfyExtension):
    async def get_node_list(self):
        return [QuickTune, SaveConcept, LoadConcept, GateStrength, ApplyConcept, DemoModel, DemoPicture, LoadDomain,
                EncodeConcept, TrainDomain, GateSweep, FidelityCurve, TraceConcepts, WhereItActed,
                ConceptDoctor]


async def comfy_entrypoint() -> PerfusionExtension:
    register()
    routes.register(PromptServer.instance.routes)
    return PerfusionExtension()
