-- KEYS: lock and fence of each lock. ARGV: the most waiters to list.
-- Answers: TIME in us, then of each lock: value, remaining ms, last token, how many wait, and a list of claims and entries.
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
  local it = line()
  local queue, waiters = it.keys(KEYS[i + 1])
  local waiting = redis.pcall('ZCARD', queue)
  out[#out + 1] = type(waiting) == 'number' and waiting or 0
  local listed = {}
  if most > 0 and type(waiting) == 'number' and waiting > 0 then
    for _, claim in ipairs(redis.call('ZRANGE', queue, 0, most - 1)) do
      listed[#listed + 1] = claim
      listed[#listed + 1] = redis.call('HGET', waiters, 'c' .. claim) or ''
    end
  end
  out[#out + 1] = listed
end
return out
