-- KEYS: lock and fence of each lock. ARGV: the most waiters to list.
-- Answers: TIME in us, then of each lock: value, remaining ms, last token, how many wait, and the entries of the first.
local most = tonumber(ARGV[1])
local time = redis.call('TIME')
local out = {time[1] * 1000000 + time[2]}
for i = 1, #KEYS, 2 do
  local value = redis.pcall('GET', KEYS[i])
  if type(value) == 'table' then value = {redis.call('TYPE', KEYS[i]).ok} end
  if type(value) == 'string' then value = string.sub(value, 1, 4300) end
  local fence = redis.pcall('GET', KEYS[i + 1])
  if type(fence) == 'table' then fence = false end
  out[#out + 1] = value
  out[#out + 1] = redis.call('PTTL', KEYS[i])
  out[#out + 1] = fence
  local at = string.find(KEYS[i + 1], '}:fence:', 1, true)
  local before, after = string.sub(KEYS[i + 1], 1, at), string.sub(KEYS[i + 1], at + 8)
  local queue = before .. ':queue:' .. after
  local waiting = redis.pcall('LLEN', queue)
  waiting = type(waiting) == 'number' and waiting or 0
  out[#out + 1] = waiting
  out[#out + 1] = most > 0 and waiting > 0 and redis.call('LRANGE', queue, 0, most - 1) or {}
end
return out
