-- KEYS: data, newest token. ARGV: token, value [, ttl ms]. Answers: 1, or the newest token as text if ARGV's is older.
local token = tonumber(ARGV[1])
if not token or token < 0 or token > 9007199254740991 or token % 1 ~= 0 then
  return redis.error_reply('ERR the fencing token is no whole number below 2^53')
end
local newest = redis.call('GET', KEYS[2])
if newest then
  local number = tonumber(newest)
  if not number then return redis.error_reply('ERR the key of the newest token holds no number') end
  if token < number then return newest end
end
local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'none' and kind ~= 'string' then
  return redis.error_reply('WRONGTYPE the data key holds a ' .. kind)
end
redis.call('SET', KEYS[2], string.format('%.0f', token))
if ARGV[3] then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
else
  redis.call('SET', KEYS[1], ARGV[2])
end
return 1
