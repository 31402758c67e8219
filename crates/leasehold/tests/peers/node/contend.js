// What every peer in JavaScript does with its library's lock; ../python/contend.py tells it.
'use strict';

const fs = require('fs');
const path = require('path');
const Redis = require('ioredis');

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function inside(folder) {
  const counter = path.join(folder, 'counter');
  const before = Number(fs.readFileSync(counter, 'utf8'));
  await sleep(1);
  fs.writeFileSync(counter, String(before + 1));
  fs.appendFileSync(path.join(folder, 'turns'), 't');
}

// `make(client, name, ttl in ms)` gives an object with `take()`, which does not wait, and `giveBack()`.
module.exports = async function contend(make) {
  const [mode, port, name, folder] = process.argv.slice(2);
  const client = new Redis(Number(port), '127.0.0.1');
  if (mode === 'try') {
    console.log((await make(client, name, 30000).take()) ? 'true' : 'false');
    process.exit(0); // Without giving it back, and without the timers that would renew it.
  }
  const lock = make(client, name, 10000);
  await client.ping();
  console.log('ready');
  let count = 0;
  while (!fs.existsSync(path.join(folder, 'stop'))) {
    if (!(await lock.take())) {
      await sleep(1);
      continue;
    }
    await inside(folder);
    count += 1;
    await lock.giveBack();
    await sleep(Math.random() * 10);
  }
  console.log(count);
  await client.quit();
};
