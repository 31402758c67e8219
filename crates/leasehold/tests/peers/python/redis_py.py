"""redis-py's Lock."""

import contend
import redis
from redis.lock import Lock


class Peer:
    def __init__(self, port, name, ttl):
        self.lock = Lock(redis.Redis(port=port), name, timeout=ttl)

    def take(self):
        return self.lock.acquire(blocking=False)

    def give_back(self):
        self.lock.release()


contend.main(Peer)
