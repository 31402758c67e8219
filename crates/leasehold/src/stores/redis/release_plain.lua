-- KEYS: the lock of each claim, then their fences (none if no lock's key has a brace in it). ARGV: owner of each claim; then a w where it may wait in line, and a +
-- where it is to be forbidden for good; then a space and its entry in the line, if that is known.
-- Answers for each (alone and plain: without a list): 1 released, 0 not held, 2 held by another; or an error.
if #ARGV == 1 then
  local value = redis.pcall('GET', KEYS[1])
  -- Held by the claim, and nobody waits: by far the most common.
  if type(value) == 'string' and string.sub(value, 1, 37) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
end
