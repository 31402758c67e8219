"""What every peer in Python does with its library's lock: `try PORT NAME`, or `contend PORT NAME FOLDER`.

`try` takes the lock for 30 seconds, says whether it did, and ends without giving it back. `contend` says `ready`, then takes the
lock again and again and counts up the number in FOLDER/counter, in two steps that lose a count unless it is alone, until there is
FOLDER/stop; then it says how often it did.
"""

import os
import random
import sys
import time


def main(make):
    """`make(port, name, ttl)` gives an object with `take()`, which does not wait, and `give_back()`."""
    mode, port, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if mode == "try":
        print("true" if make(port, name, 30).take() else "false")
        return
    folder = sys.argv[4]
    lock = make(port, name, 10)
    print("ready", flush=True)
    count = 0
    while not os.path.exists(os.path.join(folder, "stop")):
        if not lock.take():
            time.sleep(0.001)
            continue
        inside(folder)
        count += 1
        lock.give_back()
        time.sleep(random.random() * 0.01)
    print(count)


def inside(folder):
    counter = os.path.join(folder, "counter")
    with open(counter) as file:
        before = int(file.read())
    time.sleep(0.001)
    with open(counter, "w") as file:
        file.write(str(before + 1))
    with open(os.path.join(folder, "turns"), "a") as file:
        file.write("t")
