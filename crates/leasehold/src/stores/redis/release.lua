-- KEYS: lock [, tombstone]. ARGV: owner. Answers: 1 released, 0 not held, 2 held by another.
local value = redis.pcall('GET', KEYS[1])
local answer = 2
if not value then
  answer = 0
elseif type(value) == 'string' and string.sub(value, 1, 37) == ARGV[1] then
  redis.call('DEL', KEYS[1])
  answer = 1
end
if KEYS[2] then redis.pcall('SET', KEYS[2], '', 'PX', 3600000) end
return answer
