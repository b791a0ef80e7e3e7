"""Ray Serve's request router, which asks affinity.py."""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from loraplex.server.replicas.affinity import ReplicaView, rank_replicas

HELD = "held"  # in a replica's routing stats: names of adapters


class AdapterRouter(RequestRouter):
    """Sends a request to a replica that holds the adapters which its multiplexed model id names."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        key = "" if pending_request is None else pending_request.metadata.multiplexed_model_id
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        views = [self._view(id, replica) for id, replica in by_id.items()]
        return [[by_id[id] for id in group] for group in rank_replicas(key.split("+") if key else (), views)]

    def _view(self, id: str, replica: RunningReplica) -> ReplicaView:
        return ReplicaView(
            id=id,
            held=frozenset(replica.routing_stats.get(HELD, ())),
            num_ongoing=self.replica_queue_len_cache.get(replica.replica_id) or 0,
        )
