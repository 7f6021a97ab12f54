"""serve.routing: conversations have a home, and leave it where it is too busy."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.request_router import PendingRequest

from serve.generation import Conversation, Generation, Role
from serve.routing import PrefixRouter, beginning, home

DEPLOYMENT = DeploymentID("Decoder", "aerie")
NAMES = ("a", "b", "c", "d")
MOST_AHEAD = 4


def chat(*messages: tuple[Role, str]) -> Generation:
    return Generation((Conversation(messages),))


def test_all_turns_of_a_conversation_begin_alike() -> None:
    system: tuple[Role, str] = ("system", "Be kind.")
    first = chat(system, ("user", "Hello!"))
    later = chat(system, ("user", "Hello!"), ("assistant", "Hi."), ("user", "Well?"))
    other = chat(system, ("user", "Good day!"))
    assert beginning(first) == beginning(later) != beginning(other)
    text = "x" * 300
    assert beginning(Generation((text,))) == beginning(Generation((text + "and more",)))
    ids = tuple(range(300))
    assert beginning(Generation((ids,))) == beginning(Generation(((*ids, 7),)))
    assert beginning(chat(system)) is not None
    assert beginning("Hello!") is None, "as tokenize is asked"


def test_homes_are_spread_and_move_only_with_their_replica() -> None:
    keys = [f"question {number}" for number in range(2000)]
    homes = {key: NAMES[home(key, NAMES)] for key in keys}
    assert all(400 < count < 600 for count in Counter(homes.values()).values())
    left = ("d", "b", "a")
    moved = {key for key in keys if left[home(key, left)] != homes[key]}
    assert moved == {key for key in keys if homes[key] == "c"}


def router(busy: dict[str, int | None]) -> tuple[PrefixRouter, list[Any]]:
    """A router that knows how many requests each replica has, and the replicas."""
    made = PrefixRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        create_replica_wrapper_func=lambda info: info,
        event_loop=asyncio.get_running_loop(),
    )
    made.initialize_state(most_ahead=MOST_AHEAD)
    replicas = [SimpleNamespace(replica_id=ReplicaID(name, DEPLOYMENT)) for name in busy]
    for replica, count in zip(replicas, busy.values(), strict=True):
        if count is not None:
            made.replica_queue_len_cache.update(replica.replica_id, count)
    return made, replicas


def ranks(busy: dict[str, int | None], request: object) -> list[list[str]]:
    async def work() -> list[list[str]]:
        made, replicas = router(busy)
        pending = PendingRequest(args=[request], kwargs={}, metadata=None)
        chosen = await made.choose_replicas(replicas, pending)
        return [[one.replica_id.unique_id for one in group] for group in chosen]

    return asyncio.run(work())


@pytest.mark.parametrize("ahead", [0, MOST_AHEAD, MOST_AHEAD + 1])
def test_a_request_goes_home_unless_others_have_much_less_to_do(ahead: int) -> None:
    request = chat(("user", "Hello!"))
    at = NAMES[home(beginning(request) or "", NAMES)]
    # The home may be one of the two that are looked at: then nothing is known of others.
    groups = [ranks({name: 3 + ahead * (name == at) for name in NAMES}, request) for _ in range(30)]
    elsewhere = [one for one in groups if one[0] != [at]]
    if ahead <= MOST_AHEAD:
        assert not elsewhere
        assert all(len(one[1]) == 2 for one in groups), "who takes over where the home is full"
    else:
        assert all(len(one) == 1 and len(one[0]) == 2 for one in groups)


def test_what_has_no_home_goes_to_one_of_two() -> None:
    (group,) = ranks(dict.fromkeys(NAMES), "Hello!")
    assert len(set(group)) == 2
    assert ranks({}, chat(("user", "Hello!"))) == []
    (first, second) = ranks({"a": None}, chat(("user", "Hello!")))
    assert first == second == ["a"]
