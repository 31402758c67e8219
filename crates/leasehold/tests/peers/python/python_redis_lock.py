"""python-redis-lock, whose key is `lock:NAME`."""

import logging

import contend
import redis
import redis_lock


class Peer:
    def __init__(self, port, name, ttl):
        self.lock = redis_lock.Lock(redis.StrictRedis(port=port), name, expire=ttl)

    def take(self):
        return self.lock.acquire(blocking=False)

    def give_back(self):
        self.lock.release()


# It warns of every lock that it finds busy.
logging.getLogger("redis_lock").setLevel(logging.ERROR)
contend.main(Peer)
