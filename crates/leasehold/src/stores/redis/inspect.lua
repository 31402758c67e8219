-- KEYS: lock and fence of each lock. Answers: TIME in us, then value, remaining ms, last token of each lock.
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
end
return out
