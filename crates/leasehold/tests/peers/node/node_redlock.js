// node-redlock.
'use strict';

const Redlock = require('redlock');
const contend = require('./contend');

contend((client, name, ttl) => {
  const redlock = new Redlock([client], { retryCount: 0 });
  let held;
  return {
    async take() {
      try {
        held = await redlock.lock(name, ttl);
        return true;
      } catch (error) {
        if (error.name !== 'LockError') throw error;
        return false;
      }
    },
    giveBack: () => held.unlock(),
  };
});
