local call, pcall, sub = redis.call, redis.pcall, string.sub
local count = #ARGV
local ended, first, handed = {}, {}, {}
-- Where no key has a brace, the fences are not given, for they follow from the locks.
local function fence_of(i) return KEYS[count + i] or 'leasehold:{' .. KEYS[i] .. '}:fence:' .. KEYS[i] end

local function give(lock, fence, owner, value)
  if not value then return 0 end
  if type(value) == 'table' then return sub(value.err, 1, 9) == 'WRONGTYPE' and 2 or value end
  if sub(value, 1, 36) ~= sub(owner, 1, 36) then return 2 end
  if sub(value, 37, 37) == '!' and line('hand over', nil, lock, fence) then
    handed[lock] = true
    return 1
  end
  ended[#ended + 1] = lock
  if first[lock] then return 0 end
  first[lock] = true
  return 1
end

if count == 1 and #ARGV[1] == 37 then
  local answer = give(KEYS[1], fence_of(1), ARGV[1], pcall('GET', KEYS[1]))
  if ended[1] then call('DEL', ended[1]) end
  return answer
end
local seen, answers = call('MGET', unpack(KEYS, 1, count)), {}
for i = 1, count do
  local value, owner, lock = seen[i], ARGV[i], KEYS[i]
  if value and sub(value, 1, 37) == owner and not (first[lock] or handed[lock]) then
    -- Held by the claim, and nobody waits: by far the most common.
    ended[#ended + 1] = lock
    first[lock], answers[i] = true, 1
  else
    -- MGET shows a key of another type as none; and an earlier release of this very call may have handed the lock to this
    -- claim, or from it to another.
    if not value or #owner > 37 or handed[lock] then value = pcall('GET', lock) end
    if sub(owner, 38, 38) == 'w' then
      -- First, so that it is not handed what it gives back.
      line('leave', nil, lock, fence_of(i), sub(owner, 5, 36), string.match(owner, ' (.+)$'))
    end
    answers[i] = give(lock, fence_of(i), owner, value)
  end
end
if ended[1] then call('DEL', unpack(ended)) end
for i = 1, count do
  if #ARGV[i] > 37 and string.find(sub(ARGV[i], 38, 39), '+', 1, true) then
    -- Without its tombstone (memory may be full) a late request could still take the lock: the release is asked again.
    local refused = line('forbid', nil, KEYS[i], fence_of(i), sub(ARGV[i], 5, 36))
    if refused then answers[i] = refused end
  end
end
return answers
