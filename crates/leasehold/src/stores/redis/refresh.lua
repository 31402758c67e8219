-- KEYS: lock, fence. ARGV: process, ms that it counts as alive, attempt, then claims of that process that wait in line.
-- Answers: value and remaining ms of the lock, then for each claim how many are ahead, or -1 if it is not in line; or an error.
local out = line().refresh(KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[2]), ARGV[3], {unpack(ARGV, 4)})
if out.err then return out end
local value = redis.pcall('GET', KEYS[1])
if type(value) == 'table' then return redis.error_reply('WRONGTYPE lock') end
table.insert(out, 1, redis.call('PTTL', KEYS[1]))
table.insert(out, 1, value and string.sub(value, 1, 4300) or '')
return out
