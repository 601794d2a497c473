"""What the browser asks of the server: a concept of the list as a workflow carries it, and a concept to put into it.

A name is looked up in the list and nowhere else, and what is written goes through `folders.save`.
"""

import hashlib

from aiohttp import web

from ..core import concept as files
from ..core.file import brief
from . import folders


def _facts(concept: files.Concept) -> dict:
    return {"word": concept.word, "superclass": concept.superclass, "base": files.BASES[concept.base]}


def _refused(error: ValueError | OSError) -> web.Response:
    """A sentence is an answer: with a status of 400 every browser would also call it an error on its console."""
    return web.json_response({"error": error.strerror if isinstance(error, OSError) else str(error)})


def register(routes: web.RouteTableDef):
    """Add the pack's two routes to the host's."""

    @routes.get("/perfusion/concept")
    async def read(request):
        """The concept `name` of the list: its file's hash, its facts, and itself as a workflow carries it."""
        name = request.query.get("name", "")
        try:
            if name not in folders.names():
                raise ValueError(f"The concept '{brief(name)}' is not in the list. Put its file into "
                                 "models/perfusion/concepts and press R, or choose another one.")
            data = files.read(folders.find(name))  # once, as the file may be replaced meanwhile
            concept = files.parse(data, brief(name))
            embedded, digest = files.embed(concept)
        except ValueError as error:
            return _refused(error)
        return web.json_response({**_facts(concept), "sha256": hashlib.sha256(data).hexdigest(),
                                  "embedded": embedded, "embedded_sha256": digest, "cover": concept.cover})

    @routes.post("/perfusion/concept")
    async def write(request):
        """Put the concept that the body holds, as a file's bytes, into output/perfusion, under `name` if it is free."""
        name = request.query.get("name", "")
        said = brief(name)  # in sentences
        try:
            files.check_size(request.content_length or 0, said)
            data = bytearray()
            async for part in request.content.iter_any():  # no more than a concept has is taken, whatever comes
                data += part
                files.check_size(len(data), said)
            concept = files.parse(bytes(data), said)
            path = folders.save(concept, name)
        except (ValueError, OSError) as error:
            return _refused(error)
        return web.json_response({**_facts(concept), "name": path.name,
                                  "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
