// redis-semaphore's Mutex, whose key is `mutex:NAME`.
'use strict';

const { Mutex } = require('redis-semaphore');
const contend = require('./contend');

contend((client, name, ttl) => {
  const mutex = new Mutex(client, name, { lockTimeout: ttl, acquireAttemptsLimit: 1 });
  return { take: () => mutex.tryAcquire(), giveBack: () => mutex.release() };
});
