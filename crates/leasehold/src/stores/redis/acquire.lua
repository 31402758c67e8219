-- KEYS: lock, fence, tombstone. ARGV: owner, record, ttl ms, retention ms.
-- Answers: the token of a new grant, or {value, remaining ms} of what is there already.
local seen = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3])
if seen[3] then return redis.error_reply('WITHDRAWN claim') end
if seen[1] then return {string.sub(seen[1], 1, 4300), redis.call('PTTL', KEYS[1])} end
local time = redis.call('TIME')
local token = time[1] * 1000000 + time[2]
if seen[2] then
  local last = tonumber(seen[2])
  if not last then return redis.error_reply('BADFENCE token') end
  if not (last < token) then
    token = last + 1
    if not (token <= 9007199254740991 and token % 1 == 0) then return redis.error_reply('BADFENCE token') end
  end
end
local text = string.format('%.0f', token)
if not redis.call('SET', KEYS[1], ARGV[1] .. text .. ':' .. ARGV[2], 'NX', 'PX', ARGV[3]) then
  return redis.error_reply('WRONGTYPE lock')
end
if seen[2] then
  redis.call('SET', KEYS[2], text, 'PX', ARGV[4])
elseif not redis.call('SET', KEYS[2], text, 'NX', 'PX', ARGV[4]) then
  redis.call('DEL', KEYS[1])
  return redis.error_reply('BADFENCE token')
end
return token
