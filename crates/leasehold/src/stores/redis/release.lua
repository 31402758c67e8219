-- KEYS: the lock of each claim, then the tombstones wanted. ARGV: owner of each claim, with a + where a tombstone is wanted.
-- Answers for each (alone: without a list): 1 released, 0 not held, 2 held by another; or an error.
local call, pcall, sub = redis.call, redis.pcall, string.sub
local count = #ARGV
if #KEYS == 1 then
  local value = pcall('GET', KEYS[1])
  if not value then return 0 end
  if type(value) == 'table' then
    if sub(value.err, 1, 9) == 'WRONGTYPE' then return 2 end
    return value
  end
  if sub(value, 1, 37) ~= ARGV[1] then return 2 end
  return call('DEL', KEYS[1])
end
local seen = call('MGET', unpack(KEYS, 1, count))
local answers, ended, over = {}, {}, {}
for i = 1, count do
  local value, owner, answer = seen[i], ARGV[i], 2
  if #owner > 37 then
    over[#over + 1] = i
    owner = sub(owner, 1, 37)
  end
  if not value then
    -- MGET shows a key of another type as none.
    answer = call('EXISTS', KEYS[i]) * 2
  elseif sub(value, 1, 37) == owner then
    answer = 1
    ended[#ended + 1] = KEYS[i]
  end
  answers[i] = answer
end
if ended[1] and call('DEL', unpack(ended)) < #ended then
  -- Some were asked for twice: the second time they are not held any more.
  local first = {}
  for i = 1, count do
    if answers[i] == 1 then
      if first[KEYS[i]] then answers[i] = 0 end
      first[KEYS[i]] = true
    end
  end
end
for i = 1, #over do
  -- Without its tombstone (memory may be full) a late request could still take the lock: the release is to be asked again.
  local set = pcall('SET', KEYS[count + i], '', 'PX', 3600000)
  if set.err then answers[over[i]] = set end
end
if count == 1 then return answers[1] end
return answers
