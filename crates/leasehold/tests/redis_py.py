"""A contender for one lock with redis-py's Lock: told by its arguments what to do, it answers on standard output."""

import os
import sys
import time

import redis
from redis.lock import Lock

port, name, folder, seconds = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
client = redis.Redis(host="127.0.0.1", port=port)
counter = os.path.join(folder, "counter")
end = time.monotonic() + seconds
count = 0
while time.monotonic() < end:
    lock = Lock(client, name, timeout=10, sleep=0.002)
    if not lock.acquire(blocking_timeout=1):
        continue
    with open(counter) as file:
        before = int(file.read())
    time.sleep(0.001)
    with open(counter, "w") as file:
        file.write(str(before + 1))
    count += 1
    lock.release()
print(count)
