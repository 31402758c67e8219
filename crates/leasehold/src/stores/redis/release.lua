-- KEYS: the lock of each claim, then the tombstones wanted. ARGV: owner of each claim, with a + where a tombstone is wanted.
-- Answers for each: 1 released, 0 not held, 2 held by another; or an error.
local count = #ARGV
local seen = redis.call('MGET', unpack(KEYS, 1, count))
local answers, ended, over = {}, {}, {}
for i = 1, count do
  local lock, value, owner = KEYS[i], seen[i], ARGV[i]
  if #owner > 37 then
    over[#over + 1] = i
    owner = string.sub(owner, 1, 37)
  end
  if value then
    if string.sub(value, 1, 37) ~= owner then
      answers[i] = 2
    elseif ended[lock] then
      answers[i] = 0
    else
      ended[lock] = true
      ended[#ended + 1] = lock
      answers[i] = 1
    end
  else
    -- MGET shows a key of another type as none.
    answers[i] = redis.call('EXISTS', lock) * 2
  end
end
if ended[1] then redis.call('DEL', unpack(ended)) end
for i = 1, #over do
  -- Without its tombstone (memory may be full) a late request could still take the lock: the release is to be asked again.
  local set = redis.pcall('SET', KEYS[count + i], '', 'PX', 3600000)
  if set.err then answers[over[i]] = set end
end
return answers
