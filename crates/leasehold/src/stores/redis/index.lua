-- KEYS: the index of a node of a cluster. ARGV: remaining ms and name of each lock that was renewed at this node.
-- What renew.lua does on one server, where the index is among its keys.
local index, time = KEYS[1], redis.call('TIME')
local now, longest, held = time[1] * 1000 + math.floor(time[2] / 1000), 0, {}
for i = 1, #ARGV, 2 do
  local left = tonumber(ARGV[i])
  held[i], held[i + 1] = string.format('%.0f', now + left), ARGV[i + 1]
  if left > longest then longest = left end
end
redis.call('ZADD', index, unpack(held))
local ended = redis.call('ZRANGEBYSCORE', index, '-inf', '(' .. string.format('%.0f', now), 'LIMIT', 0, 200)
if ended[1] then redis.call('ZREM', index, unpack(ended)) end
if redis.call('PTTL', index) < longest then redis.call('PEXPIRE', index, string.format('%.0f', longest * 2)) end
return 0
