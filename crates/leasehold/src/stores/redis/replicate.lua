-- KEYS: lock. ARGV: owner with its token; ttl ms, for a key without an end. Writes the lock's end anew as it is, so that WAIT has
-- something to wait for.
-- Answers: remaining ms, or -2 if it is lost.
local value, owner, sub = redis.pcall('GET', KEYS[1]), ARGV[1], string.sub
if type(value) ~= 'string' or sub(value, 1, 36) ~= sub(owner, 1, 36) or sub(value, 38, #owner) ~= sub(owner, 38) then
  return -2
end
local left = redis.call('PTTL', KEYS[1])
if left < 1 then left = tonumber(ARGV[2]) end
redis.call('PEXPIRE', KEYS[1], left)
return left
