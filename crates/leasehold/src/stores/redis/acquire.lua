-- KEYS: lock, fence and tombstone of each claim. ARGV: owner, record and ttl ms of each.
-- Answers for each: the token of a new grant, or {value, remaining ms} of what is there already, or an error.
local seen = redis.call('MGET', unpack(KEYS))
local time = redis.call('TIME')
local now, now_text = time[1] * 1000000 + time[2], time[1] .. string.sub('00000' .. time[2], -6)
local answers = {}

local function occupant(lock)
  local value = redis.pcall('GET', lock)
  if type(value) ~= 'string' then return redis.error_reply('WRONGTYPE lock') end
  return {string.sub(value, 1, 4300), redis.call('PTTL', lock)}
end

for i = 1, #KEYS, 3 do
  local lock, fence, last, token, text = KEYS[i], KEYS[i + 1], seen[i + 1], now, now_text
  local answer
  if seen[i + 2] then
    answer = redis.error_reply('WITHDRAWN claim')
  elseif seen[i] then
    answer = occupant(lock)
  else
    if last then
      last = tonumber(last)
      if not last then
        answer = redis.error_reply('BADFENCE token')
      elseif not (last < now) then
        token = last + 1
        text = string.format('%.0f', token)
        if not (token <= 9007199254740991 and token % 1 == 0) then answer = redis.error_reply('BADFENCE token') end
      end
    end
    if not answer then
      local ttl, kept = ARGV[i + 2], '86400000'
      if #ttl > 7 and ttl * 2 > 86400000 then kept = string.format('%.0f', ttl * 2) end
      local set = redis.pcall('SET', lock, ARGV[i] .. text .. ':' .. ARGV[i + 1], 'NX', 'PX', ttl)
      if not set then
        -- Another type, or granted to another claim of this very call.
        answer = occupant(lock)
      elseif set.err then
        answer = set
      else
        answer = token
        if last then
          set = redis.pcall('SET', fence, text, 'PX', kept)
        else
          -- MGET shows a key of another type as none, and NX will not overwrite it.
          set = redis.pcall('SET', fence, text, 'NX', 'PX', kept)
        end
        if not set or set.err then
          redis.call('DEL', lock)
          answer = set or redis.error_reply('BADFENCE token')
        end
      end
    end
  end
  answers[(i + 2) / 3] = answer
end
return answers
