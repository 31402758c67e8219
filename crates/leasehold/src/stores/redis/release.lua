-- KEYS: the lock of each claim, then their fences. ARGV: owner of each claim, with a + where it is to be forbidden for
-- good and a w where it may wait in line.
-- Answers for each (alone and plain: without a list): 1 released, 0 not held, 2 held by another; or an error.
local call, pcall, sub = redis.call, redis.pcall, string.sub
local count = #ARGV
local ended, first = {}, {}

local function give(lock, fence, owner, value)
  if not value then return 0 end
  if type(value) == 'table' then return sub(value.err, 1, 9) == 'WRONGTYPE' and 2 or value end
  if sub(value, 1, 36) ~= sub(owner, 1, 36) then return 2 end
  if sub(value, 37, 37) == '!' and line().hand_over(lock, fence) then return 1 end
  ended[#ended + 1] = lock
  if first[lock] then return 0 end
  first[lock] = true
  return 1
end

if count == 1 and #ARGV[1] == 37 then
  local value = pcall('GET', KEYS[1])
  if value and type(value) == 'string' and sub(value, 1, 37) == ARGV[1] then return call('DEL', KEYS[1]) end
  local answer = give(KEYS[1], KEYS[2], ARGV[1], value)
  if ended[1] then call('DEL', ended[1]) end
  return answer
end
local seen, answers = call('MGET', unpack(KEYS, 1, count)), {}
for i = 1, count do
  local value, owner = seen[i], ARGV[i]
  -- MGET shows a key of another type as none; and a claim that waits may have been handed the lock a moment ago, by an
  -- earlier release of this very call.
  if not value or #owner > 37 then value = pcall('GET', KEYS[i]) end
  answers[i] = give(KEYS[i], KEYS[count + i], owner, value)
  if #owner > 37 and string.find(owner, 'w', 38, true) then line().leave(KEYS[count + i], sub(owner, 5, 36)) end
end
if ended[1] then call('DEL', unpack(ended)) end
for i = 1, count do
  if #ARGV[i] > 37 and string.find(ARGV[i], '+', 38, true) then
    -- Without its tombstone (memory may be full) a late request could still take the lock: the release is asked again.
    local refused = line().forbid(KEYS[count + i], sub(ARGV[i], 5, 36))
    if refused then answers[i] = refused end
  end
end
return answers
