"""Many devices: one server per replica of a Ray Serve deployment, behind one address.

A WebSocket stays with the replica that took it. Replicas tell a small actor how many places they have free, so that
a client who finds none is sent to one that has some instead of waiting.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from .app import create_app
from .errors import ServingError
from .logs import configure
from .neighbours import REPORT_LASTS
from .service import Service
from .settings import Settings

__all__ = ["APP", "Cluster", "deploy", "start_cluster", "stop_cluster"]

APP = "lightforcing"
_BOARD = "lightforcing-places"
_NAMESPACE = "lightforcing"
_HEALTH_EVERY = 5.0
_OVERHEAD = 32
"""Requests beside the sessions that a replica serves at once."""


@dataclass(frozen=True)
class Cluster:
    """How a bundle is spread. `cpus` and `gpus` are what each replica reserves."""

    replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    address: str | None = None
    """An existing cluster, such as `auto`; `None` starts one on this machine."""

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.cpus < 0 or self.gpus < 0:
            raise ServingError(
                f"{self.replicas} replicas with {self.cpus:g} CPUs and {self.gpus:g} GPUs each; expected 1 or more, "
                f"and nothing negative"
            )


@ray.remote(num_cpus=0)
class _Board:
    """Free places by replica, with the time they were told."""

    def __init__(self) -> None:
        self._free: dict[str, tuple[int, float]] = {}

    def report(self, replica: str, free: int) -> None:
        self._free[replica] = (free, time.monotonic())

    def others_free(self, replica: str) -> int:
        now = time.monotonic()
        return sum(
            free for name, (free, told) in self._free.items() if name != replica and now - told < REPORT_LASTS
        )


class _BoardNeighbours:
    """Implements `Neighbours` over the actor."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._board: Any = _Board.options(  # type: ignore[attr-defined]
            name=_BOARD, namespace=_NAMESPACE, get_if_exists=True, lifetime="detached"
        ).remote()

    async def report(self, free: int) -> None:
        """See `Neighbours.report`."""
        await self._board.report.remote(self._name, free)

    async def have_room(self) -> bool:
        """See `Neighbours.have_room`."""
        return bool(await self._board.others_free.remote(self._name))


class _Replica:
    """One server, on the device that Ray gives this process."""

    def __init__(self, settings: Settings) -> None:
        configure()
        name = serve.get_replica_context().replica_tag
        # Each replica keeps its clips apart: only one server may write a folder's records.
        self._settings = replace(settings, videos=settings.videos / name)
        self._neighbours = _BoardNeighbours(name)
        self._service: Service | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self._settings, wait=True)
        self._service = app.state.service
        self._service.neighbours = self._neighbours
        return app

    async def check_health(self) -> None:
        """Raises if the pipeline's workers have ended: Ray then replaces the replica."""
        service = self._service
        if service is not None and service.state == "ready" and not service.pipeline.health().alive:
            raise RuntimeError("the workers of the pipeline have ended")


def deploy(settings: Settings, cluster: Cluster) -> None:
    """Deploy a bundle, or replace the one deployed by this one, replica by replica; returns when all are ready.

    Sessions of replicas that are replaced may go on for `settings.drain_seconds`.
    """
    deployment = serve.deployment(
        name="Replica",
        num_replicas=cluster.replicas,
        max_ongoing_requests=settings.sessions + settings.limits.queue + _OVERHEAD,
        graceful_shutdown_timeout_s=max(1.0, settings.drain_seconds),
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=_HEALTH_EVERY,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
    )
    replica = deployment(serve.ingress()(_Replica))
    settings = replace(settings, clips=cluster.replicas == 1)
    serve.run(replica.bind(settings), name=APP, route_prefix="/")


def start_cluster(settings: Settings, cluster: Cluster) -> None:
    """Join a cluster, or start one on this machine that listens on loopback only; start its HTTP proxy."""
    if cluster.address is None:
        ray.init(
            num_cpus=max(1, round(cluster.replicas * cluster.cpus)),
            include_dashboard=False,
            namespace=_NAMESPACE,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
        )
    else:
        ray.init(address=cluster.address, namespace=_NAMESPACE, log_to_driver=False)
    serve.start(http_options={"host": settings.host, "port": settings.port})


def stop_cluster() -> None:
    """End the deployment and leave the cluster."""
    serve.shutdown()
    ray.shutdown()
