-- KEYS: the lock of each claim, then their fences, then the tombstones wanted. ARGV: owner of each claim, with a + where a
-- tombstone is wanted and a w where the claim may wait in line.
-- Answers for each (alone and plain: without a list): 1 released, 0 not held, 2 held by another; or an error.
local call, pcall, sub = redis.call, redis.pcall, string.sub
local count = #ARGV
local ended, first, over = {}, {}, {}

local function give(lock, fence, owner, value)
  local plain = sub(owner, 1, 36)
  local waits = #owner > 37 and string.find(owner, 'w', 38, true)
  local answer = 2
  if not value then
    answer = 0
  elseif type(value) == 'table' then
    if sub(value.err, 1, 9) ~= 'WRONGTYPE' then return value end
  elseif sub(value, 1, 36) == plain then
    answer = 1
    if sub(value, 37, 37) == ':' or not line().hand_over(lock, fence) then
      if first[lock] then answer = 0 end
      first[lock] = true
      ended[#ended + 1] = lock
    end
  end
  if waits then line().leave(fence, sub(owner, 5, 36)) end
  return answer
end

if count == 1 and #ARGV[1] == 37 then
  local answer = give(KEYS[1], KEYS[2], ARGV[1], pcall('GET', KEYS[1]))
  if ended[1] then call('DEL', ended[1]) end
  return answer
end
local seen, answers = call('MGET', unpack(KEYS, 1, count)), {}
for i = 1, count do
  local value = seen[i]
  -- MGET shows a key of another type as none; and a claim that waits may have been handed the lock a moment ago, by an
  -- earlier release of this very call.
  if not value or #ARGV[i] > 37 then value = pcall('GET', KEYS[i]) end
  answers[i] = give(KEYS[i], KEYS[count + i], ARGV[i], value)
  if #ARGV[i] > 37 and string.find(ARGV[i], '+', 38, true) then over[#over + 1] = i end
end
if ended[1] then call('DEL', unpack(ended)) end
for number, i in ipairs(over) do
  -- Without its tombstone (memory may be full) a late request could still take the lock: the release is asked for again.
  local set = pcall('SET', KEYS[2 * count + number], '', 'PX', 3600000)
  if set.err then answers[i] = set end
end
return answers
