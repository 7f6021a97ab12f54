"""Calls of those who run the service: `/admin/draft` brings a draft head into service."""

# No `from __future__ import annotations`: FastAPI reads the types of the routes at run time.

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import Field

from core.errors import ConfigError, InputError
from serve.description import GUARDED, answers
from serve.desk import shown_decision
from serve.errors import ApiError
from serve.fields import Body, Unicode
from serve.models import Models

# A call waits so long for the replicas to load a head; they go on after that.
LOADING_S = 300.0


class DraftRequest(Body):
    """A head to use, at once or after a trial; without `model`, of the first one."""

    model: Unicode | None = None
    path: Unicode = Field(min_length=1, max_length=4096)
    canary: float | None = Field(None, gt=0, lt=1, description="share of the requests")


def add_admin(api: FastAPI, models: Models) -> None:
    """Add the routes."""

    @api.get("/admin/draft", responses=answers(None, *GUARDED, 403, 404))
    async def drafts(model: str | None = None) -> dict[str, Any]:
        """A model's head in use, the one on trial, and what came of earlier ones."""
        return await models.named(model).desk.status()

    @api.delete("/admin/draft", responses=answers(None, *GUARDED, 403, 404))
    async def abort(model: str | None = None) -> dict[str, Any]:
        """End a model's trial; what it was is the answer."""
        try:
            return shown_decision(await models.named(model).desk.abort())
        except ConfigError as error:
            raise ApiError(404, str(error), code="no_trial") from error

    @api.post("/admin/draft", responses=answers(None, *GUARDED, 400, 403, 404, 409))
    async def draft(body: DraftRequest) -> JSONResponse:
        """Load a head beside the one in use. Answers when it takes requests, or never will."""
        desk = models.named(body.model).desk
        try:
            head = await desk.propose(body.path, body.canary)
        except InputError as error:
            raise ApiError(400, str(error), param="path") from error
        except ConfigError as error:
            raise ApiError(409, str(error), code="trial_running") from error
        decision = await desk.settled(head.number, LOADING_S)
        if decision is not None and decision.outcome != "promoted":
            message = f"the draft head is not used: {decision.reason}"
            raise ApiError(400, message, param="path", code="draft_refused")
        status = await desk.status()
        if decision is not None:
            return JSONResponse({**shown_decision(decision), "state": "promoted"})
        trial = status["trial"] or {}
        state = trial.get("state", "loading")
        return JSONResponse(
            {"number": head.number, "path": head.path, "state": state},
            status_code=202 if state == "loading" else 200,
        )
