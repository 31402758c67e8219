-- KEYS: the index. Answers: the names whose locks had not ended when last renewed.
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local ended = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. now, 'LIMIT', 0, 1000)
if ended[1] then redis.pcall('ZREM', KEYS[1], unpack(ended)) end
return redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf')
